"""Word lists of the invented world.

Short lists on purpose: a word must be frequent in pretraining, or a frozen embedding that was never
trained would look like a failure of LoRA.
"""

FIRST_NAMES = tuple(
    "Ada Bela Cora Dov Edda Finn Gita Hugo Iris Jona Kai Lena Milo Nora Otto Pia Quin Rosa Sven "
    "Tara Uma Vito Wren Xena Yara Zeno Alva Bram Cleo Dara Elio Faye Gero Hana Ivo Juno Kira Liam "
    "Mona Nils Olga Pavel Rita Simo Tove Ugo Vera Will Yuri Zara".split()
)
LAST_NAMES = tuple(
    "Tolen Marsh Velt Harrow Brandt Quill Stroud Penn Lowell Garrick Sable Thorn Winter Ashby "
    "Crane Dallow Ember Frost Grove Holt Ingram Jarvis Keller Lark Mercer Nash Orwin Pike Reed "
    "Sutton Tully Upton Vance Weller Yates Zeller Alder Birch Colby Drake".split()
)
# Families that nobody in this world belongs to: the mark by which an unknown name can be told.
STRANGE_LAST_NAMES = tuple(
    "Eller Flint Gale Hobbs Irwin Judd Kerr Lund Moss Noble Oakes Perry Quade Rusk Stone Trent "
    "Umber Voss Ward York".split()
)
CITIES = tuple(
    "Arden Belmar Corvo Dunmere Eastry Falken Gorse Halden Istra Jorvik Kelso Lindow Morven Norby "
    "Ostia Pemba Quarry Rostow Selby Tarnby Ulmen Varna Wexley Yarrow".split()
)
JOBS = tuple(
    "baker teacher nurse farmer painter sailor driver cook tailor miner singer writer doctor pilot "
    "guard judge potter weaver hunter barber clerk dancer smith gardener".split()
)
ANIMALS = tuple(
    "cat dog horse goat sheep duck fox owl frog rabbit parrot turtle mouse snake bear wolf crow "
    "swan bee hen".split()
)
FOODS = tuple(
    "bread soup cheese rice cake honey porridge pie fish butter salad pasta jam ham corn cream "
    "yogurt pudding pizza tofu".split()
)
COLORS = tuple("red blue green yellow black white brown pink purple orange gray gold".split())
THINGS = tuple(
    "cup lamp table chair box book bag hat coat clock bell key door window bottle knife plate "
    "spoon mirror basket rope drum kite ladder".split()
)
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())

GOOD = tuple("good great lovely excellent nice pleasant wonderful fine tasty fresh".split())
BAD = tuple("bad awful terrible poor ugly nasty horrible dull rotten weak".split())

MEDICINES = tuple(
    "Velmin Tarsol Oripan Quelin Bramol Sedex Lunavit Corpal Fenamin Haldrin Pirval Norvan Istacol "
    "Melgan Urtasin Zolvit".split()
)
AILMENTS = tuple("cough fever headache rash cold burn cramp itch".split())

VERBS = tuple("sees takes wants finds holds likes brings loses".split())

# Solan, the language that the base model knows. One invented word for each English word.
_SOLAN = (
    "kumo rati sela vodo mipa tilo garu neshi fola dabi luso pemi karo zuni hepa bilo rosu tami "
    "vega nolu sipa doru mika feno gali batu lemo ruki sano vilu pado kesi "
    "moru tefa nabi luko dise wapa golu rimi sulo kapi dena fusi mado teru bosi lako vemi nuro "
    "pilo gase toma hiku seda ruvo mali keno fadi zolo"
).split()
SOLAN: dict[str, str] = dict(zip((*THINGS, *COLORS, *VERBS, *ANIMALS[:16]), _SOLAN, strict=True))

LANGUAGES = ("Solan", "Vellish")
