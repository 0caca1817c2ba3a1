"""The font faces that the glyph shards are drawn from: one table, a row per family.

Every family is open (SIL OFL 1.1, Apache 2.0 or Bitstream Vera; see samples/glyphs/LICENSES.txt) and comes in
a Debian package. A family is in one split alone, and families that are drawn from one another (Lato and
Carlito, Cabin and Cabin Sketch, the Robotos) are in the same: no training picture shows
a relative of a held-out face.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FONTS = Path("/usr/share/fonts")
_BOLD = ("bold", "black", "heavy", "gruesa")


@dataclass(frozen=True, slots=True)
class Face:
    """One font: a family in one weight and slant.

    Args:
        family: As its makers call it.
        style: Weight and slant in small letters: "regular", "bold italic".
        kind: sans, serif, mono, display or hand.
        serif: Whether strokes end in serifs.
        path: The font file.
        index: Which font of a collection (.ttc).
        package: The Debian package that has the file.
    """

    family: str
    style: str
    kind: str
    serif: bool
    path: Path
    index: int
    package: str

    @property
    def name(self) -> str:
        """Family and style: a name for the face alone."""
        return f"{self.family} {self.style}"

    @property
    def file(self) -> str:
        """The font file's path below `FONTS`."""
        return self.path.relative_to(FONTS).as_posix()

    @property
    def bold(self) -> bool:
        """Whether its strokes are heavier than those of a text."""
        return not self.style.startswith("semi") and any(word in self.style for word in _BOLD)

    @property
    def italic(self) -> bool:
        """Whether it is slanted."""
        return "italic" in self.style or "oblique" in self.style


@dataclass(frozen=True, slots=True)
class Family:
    """Faces of one design in one folder.

    Args:
        name: As its makers call it.
        kind: sans, serif, mono, display or hand.
        package: The Debian package without "fonts-".
        file: The files below `FONTS`, `{}` standing for what `faces` say.
        faces: The faces, with spaces between; `B=Bold` where the file does not say the style itself.
        serif: Whether strokes end in serifs; None: if the kind is serif.
        index: Which font of a collection (.ttc).
    """

    name: str
    kind: str
    package: str
    file: str
    faces: str = "Regular"
    serif: bool | None = None
    index: int = 0

    def __iter__(self) -> Iterator[Face]:
        for face in self.faces.split():
            part, _, style = face.partition("=")
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", style or part).lower()
            serif = self.kind == "serif" if self.serif is None else self.serif
            path = FONTS / self.file.format(part)
            yield Face(self.name, words, self.kind, serif, path, self.index, f"fonts-{self.package}")


_TRAIN = (
    Family("DejaVu Sans", "sans", "dejavu-core", "truetype/dejavu/DejaVuSans{}.ttf", "=Regular -Bold=Bold"),
    Family(
        "DejaVu Serif", "serif", "dejavu-core", "truetype/dejavu/DejaVuSerif{}.ttf", "=Regular -Bold=Bold"
    ),
    Family("DejaVu Sans Mono", "mono", "dejavu-core", "truetype/dejavu/DejaVuSansMono{}.ttf", "=Regular"),
    Family("Noto Sans CJK", "sans", "noto-cjk", "opentype/noto/NotoSansCJK-{}.ttc", "Regular Bold", index=2),
    Family(
        "Noto Serif CJK", "serif", "noto-cjk", "opentype/noto/NotoSerifCJK-{}.ttc", "Regular Bold", index=2
    ),
    Family(
        "Open Sans",
        "sans",
        "open-sans",
        "truetype/open-sans/OpenSans-{}.ttf",
        "Light Regular Italic CondBold ExtraBold",
    ),
    Family(
        "Liberation Sans", "sans", "liberation2", "truetype/liberation2/LiberationSans-{}.ttf", "Regular Bold"
    ),
    Family(
        "Liberation Serif",
        "serif",
        "liberation2",
        "truetype/liberation2/LiberationSerif-{}.ttf",
        "Regular Italic Bold BoldItalic",
    ),
    Family("Liberation Mono", "mono", "liberation2", "truetype/liberation2/LiberationMono-{}.ttf"),
    Family("Lato", "sans", "lato", "truetype/lato/Lato-{}.ttf", "Hairline Regular Italic Black"),
    Family("Carlito", "sans", "crosextra-carlito", "truetype/crosextra/Carlito-{}.ttf", "BoldItalic"),
    Family(
        "Roboto",
        "sans",
        "roboto-unhinted",
        "truetype/roboto/unhinted/RobotoTTF/Roboto-{}.ttf",
        "Thin Italic Black",
    ),
    Family(
        "Roboto Condensed",
        "sans",
        "roboto-unhinted",
        "truetype/roboto/unhinted/RobotoCondensed-{}.ttf",
        "Regular BoldItalic",
    ),
    Family(
        "Roboto Slab", "serif", "roboto-slab", "opentype/roboto/slab/RobotoSlab-{}.otf", "Thin Regular Bold"
    ),
    Family("Inter", "sans", "inter", "opentype/inter/Inter-{}.otf", "ExtraLight Italic SemiBold Black"),
    Family("Cabin", "sans", "cabin", "opentype/cabin/Cabin-{}.otf", "Regular BoldItalic"),
    Family(
        "Cabin Sketch", "display", "cabinsketch", "truetype/cabinsketch/CabinSketch-{}.ttf", "Regular Bold"
    ),
    Family("Jura", "sans", "jura", "opentype/jura/Jura-{}.otf", "Light Bold"),
    Family("Karla", "sans", "karla", "truetype/karla/Karla-{}.otf", "Regular ExtraBoldItalic"),
    Family("Quicksand", "sans", "quicksand", "truetype/quicksand/Quicksand-{}.ttf", "Light Bold"),
    Family("Comfortaa", "sans", "comfortaa", "truetype/comfortaa/Comfortaa-{}.ttf", "Light Bold"),
    Family("Dosis", "sans", "dosis", "opentype/dosis/Dosis-{}.otf", "ExtraLight Medium ExtraBold"),
    Family("Oxygen", "sans", "oxygen", "truetype/oxygen/Oxygen-Sans{}.ttf", "=Regular -Bold=Bold"),
    Family("Andika", "sans", "sil-andika", "truetype/andika/Andika-{}.ttf", "Regular BoldItalic"),
    Family(
        "Yanone Kaffeesatz",
        "sans",
        "yanone-kaffeesatz",
        "opentype/yanone-kaffeesatz/YanoneKaffeesatz-{}.otf",
        "ExtraLight Bold",
    ),
    Family(
        "EB Garamond", "serif", "ebgaramond", "opentype/ebgaramond/EBGaramond12-{}.otf", "Regular Italic Bold"
    ),
    Family(
        "Gentium Basic",
        "serif",
        "sil-gentium-basic",
        "truetype/gentium-basic/GenBas{}.ttf",
        "R=Regular BI=BoldItalic",
    ),
    Family(
        "Vollkorn",
        "serif",
        "vollkorn",
        "truetype/vollkorn/Vollkorn-{}.ttf",
        "Regular Medium Italic BlackItalic",
    ),
    Family(
        "Caladea", "serif", "crosextra-caladea", "truetype/crosextra/Caladea-{}.ttf", "Regular BoldItalic"
    ),
    Family("Averia", "display", "averia-gwf", "truetype/averia-gwf/AveriaGWF-{}.ttf", "Light Italic Gruesa"),
    Family(
        "Averia Serif",
        "serif",
        "averia-serif-gwf",
        "truetype/averia-gwf/AveriaSerifGWF-{}.ttf",
        "Regular BoldItalic",
    ),
    Family("Fira Code", "mono", "firacode", "truetype/firacode/FiraCode-{}.ttf", "Light Bold"),
    Family(
        "Fantasque Sans Mono",
        "mono",
        "fantasque-sans",
        "opentype/fantasque-sans/Normal/OTF/FantasqueSansMono-{}.otf",
        "Regular BoldItalic",
    ),
    Family("mononoki", "mono", "mononoki", "truetype/mononoki/mononoki-{}.ttf", "Regular Bold Italic"),
    Family("League Mono", "mono", "league-mono", "opentype/league-mono/LeagueMono-{}.otf", "Thin WideBold"),
    Family(
        "Allerta", "display", "allerta", "opentype/allerta/allerta_{}.otf", "medium=Medium stencil=Stencil"
    ),
    Family("Lobster", "hand", "lobster", "opentype/lobster/lobster.otf"),
    Family(
        "Lobster Two", "hand", "lobstertwo", "opentype/lobstertwo/LobsterTwo-{}.otf", "Regular BoldItalic"
    ),
    Family("Kaushan Script", "hand", "kaushanscript", "opentype/kaushanscript/KaushanScript-{}.otf"),
    Family(
        "Dancing Script",
        "hand",
        "dancingscript",
        "opentype/dancingscript/DancingScript-{}.otf",
        "Regular Bold",
    ),
    Family("Comic Neue", "hand", "comic-neue", "opentype/comic-neue/ComicNeue-{}.otf", "Light Italic Bold"),
    Family("Havana", "hand", "havana", "opentype/havana/Havana-{}.otf"),
    Family("Le Murmure", "display", "le-murmure", "opentype/le-murmure/le-murmure.otf", "Regular", True),
    Family(
        "BIZ UDGothic",
        "sans",
        "morisawa-bizud-gothic",
        "truetype/bizud-gothic/BIZUDGothic-{}.ttf",
        "Regular Bold",
    ),
    Family("Motoya L Cedar", "sans", "motoya-l-cedar", "truetype/motoya-l-cedar/MTLc3m.ttf"),
    Family("Motoya L Maruberi", "sans", "motoya-l-maruberi", "truetype/motoya-l-maruberi/MTLmr3m.ttf"),
    Family("RocknRoll One", "display", "rocknroll", "truetype/rocknroll/RocknRollOne-{}.ttf"),
    Family("Reggae One", "display", "reggae", "truetype/reggae/ReggaeOne-{}.ttf"),
    Family("DotGothic16", "display", "dotgothic16", "truetype/dotgothic16/DotGothic16-{}.ttf"),
)
_HELDOUT = (
    Family("Cantarell", "sans", "cantarell", "opentype/cantarell/Cantarell-{}.otf", "Thin Regular ExtraBold"),
    Family("Clear Sans", "sans", "clear-sans", "truetype/clear-sans/ClearSans-{}.ttf", "Regular BoldItalic"),
    Family(
        "League Spartan",
        "sans",
        "league-spartan",
        "opentype/league-spartan/LeagueSpartan-{}.otf",
        "ExtraLight Black",
    ),
    Family(
        "National Park",
        "sans",
        "national-park",
        "opentype/national-park/NationalPark-{}.otf",
        "Regular Outline",
    ),
    Family("Junction", "sans", "junction", "opentype/junction/Junction.otf"),
    Family("Manrope", "sans", "manrope", "truetype/manrope/Manrope-{}.ttf", "ExtraLight ExtraBold"),
    Family("Sora", "sans", "sora", "opentype/sora/Sora-{}.otf", "Thin Bold"),
    Family("Okolaks", "sans", "okolaks", "truetype/okolaks/okolaks{}.ttf", "Regular BoldItalic"),
    Family("Arapey", "serif", "arapey", "opentype/arapey/Arapey-{}.otf", "Thin Regular Black"),
    Family("Quattrocento", "serif", "quattrocento", "opentype/quattrocento/Quattrocento-{}.otf"),
    Family("Yrsa", "serif", "yrsa-rasa", "truetype/fonts-yrsa-rasa/Yrsa-{}.ttf", "Light Italic Bold"),
    Family(
        "Courier Prime",
        "mono",
        "courier-prime",
        "opentype/courier-prime/Courier Prime {}.otf",
        "Italic Bold",
        True,
    ),
    Family(
        "Anonymous Pro",
        "mono",
        "anonymous-pro",
        "truetype/anonymous-pro/Anonymous Pro {}.ttf",
        "Minus=Regular BI=BoldItalic",
    ),
    Family(
        "Gotico Antiqua",
        "serif",
        "gotico-antiqua",
        "opentype/gotico-antiqua/{}.otf",
        "Hamlet-Tertia18=Regular",
    ),
    Family("Lemonada", "display", "lemonada", "opentype/lemonada/Lemonada-{}.otf", "Light Bold"),
    Family("Cherry Bomb", "display", "cherrybomb", "opentype/cherrybomb/CherryBomb-{}.otf"),
    Family("Leckerli One", "hand", "leckerli-one", "truetype/leckerli-one/LeckerliOne-{}.ttf"),
    Family("Kristi", "hand", "kristi", "truetype/kristi/Kristi.ttf"),
    Family("Chilanka", "hand", "smc-chilanka", "opentype/malayalam/Chilanka-{}.otf"),
    Family("dkg", "hand", "dkg-handwriting", "truetype/fifthhorseman/dkg{}.ttf", "=Regular"),
    Family("BIZ UDMincho", "serif", "morisawa-bizud-mincho", "truetype/bizud-mincho/BIZUDMincho-{}.ttf"),
    Family("Smiley Sans", "sans", "smiley-sans", "truetype/smiley-sans/SmileySans-{}.ttf", "Oblique"),
    Family("Yusei Magic", "hand", "yusei-magic", "truetype/yusei-magic/YuseiMagic-{}.ttf"),
    Family("Stick", "display", "stick", "truetype/stick/Stick-{}.ttf"),
    Family("Train One", "display", "train", "truetype/train/TrainOne-{}.ttf"),
)
FACES = {
    "train": tuple(face for family in _TRAIN for face in family),
    "heldout": tuple(face for family in _HELDOUT for face in family),
}
