"""The routes, one module per resource."""

from clipkit_service.routes import catalogue, classify, embeddings, search, system

ROUTERS = (search.router, classify.router, embeddings.router, catalogue.router, system.router)

__all__ = ["ROUTERS"]
