"""Pictures changed at random: crops, augmentation, views, every number drawn by its key."""
