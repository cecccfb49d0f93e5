"""The words for sides, actions, habits, allergens, and for what small numbers measure."""

from ..phrases import Phrases

SIDES = {"left": "left", "right": "right", "l": "left", "r": "right"}
SIDES |= dict.fromkeys(("both", "bilateral", "bilaterally"), "both")
SIDES |= {"left-sided": "left", "right-sided": "right"}
ACTIONS = {
    "stop": "stop stopped stopping discontinue discontinued discontinuing hold holding quit cease "
    "drop ditch",
    "continue": "continue continued continuing continues maintain keep keeping refill resume stay",
    "start": "start started starting initiate begin began prescribe prescribed add initiated",
    "increase": "increase increased increasing double raise",
    "decrease": "decrease decreased reduce reduced lower taper wean halve",
}
# What a verb and a word behind it, at once or behind what it is done to, say: "bring it down".
PHRASAL_ACTIONS = {
    **dict.fromkeys((("go", "up"), ("step", "up"), ("bump", "up"), ("bring", "up")), "increase"),
    **dict.fromkeys((("going", "up"), ("move", "up"), ("turn", "up")), "increase"),
    ("bump", "to"): "increase",
    **dict.fromkeys((("go", "down"), ("step", "down"), ("bring", "down")), "decrease"),
    **dict.fromkeys(
        (("cut", "back"), ("cut", "down"), ("cut", "half"), ("dial", "back")), "decrease"
    ),
    **dict.fromkeys((("take", "off"), ("come", "off"), ("get", "off"), ("taking", "off")), "stop"),
}
PHRASAL_VERBS = frozenset(verb for verb, _ in PHRASAL_ACTIONS)
ACTION_OF = {word: action for action, words in ACTIONS.items() for word in words.split()}
# "Switch from X to Y", "replace X with Y": what stops stands behind the first word.
SWITCHES = frozenset(
    """switch switched switching change changed changing transition transitioned swap swapped
    convert converted""".split()
)
REPLACES = frozenset("replace replaced replacing swap swapped substitute substituted".split())
HABITS: Phrases[str] = Phrases()
for _habit, _names in {
    "tobacco": "tobacco,smoke,smoking,smoker,smoked,cigarette,cigar,nicotine,vape,vaping,"
    "chewing tobacco,nonsmoker,non smoker,pack year,cigarette smoking",
    "alcohol": "alcohol,drink alcohol,drinking,drinker,drinks,beer,wine,liquor,etoh,ethanol,drink,"
    "alcoholic beverage,whiskey,vodka,nondrinker,non drinker,sober",
    "drugs": "illicit drug,recreational drug,street drug,drug use,marijuana,cocaine,heroin,weed,"
    "cannabis,methamphetamine,iv drug,illicit,intravenous drug,illicit substance,meth,drugs,"
    "recreational,illegal drug,harder substance,hard drug,illicit substance,substance use",
}.items():
    for _phrase in _names.split(","):
        HABITS.add(_phrase, _habit)
# What people are allergic to, besides drugs.
ALLERGENS: Phrases[str] = Phrases()
for _phrase in (
    "latex,iodine,contrast,contrast dye,shellfish,peanut,tree nut,nut,egg,milk,dairy,soy,wheat,"
    "gluten,pollen,grass,dust,dust mite,mold,cat,dog,pet dander,bee,bee sting,wasp,strawberry,"
    "adhesive,tape,nickel,ragweed,fish,shrimp,horse serum,bandage,perfume,cockroach"
).split(","):
    ALLERGENS.add(_phrase, _phrase)


def _by_name(table: str) -> dict[str, str]:
    """{each name: the first of its entry} of "name other other; name other"."""
    return {name: names.split()[0] for names in table.split(";") for name in names.split()}


# What numbers below 10 measure; in speech, most others are "one of them".
MEASURES = _by_name(
    """a1c hba1c glycohemoglobin; inr; potassium k; creatinine cr; gleason; apgar; gcs; psa;
    stage; grade; hemoglobin hgb hb; calcium ca; albumin; tsh; score; dilated; ph"""
)
# What others measure. A number that is said of one of these supports none of another.
LABELS = MEASURES | _by_name(
    """pulse; respiration respiratory respirations rr; temperature temp; weight weigh weighed
    weighs; saturation spo2 sat satting o2 ox oxygen; glucose sugar; wbc white; platelet plt;
    sodium na; bun; cholesterol; ldl; hdl; triglyceride; ejection ef lvef; hematocrit hct;
    ferritin; bmi; height; ast; alt; bilirubin; lipase; bnp; esr; crp; pressure bp; ketone"""
)
# Classes that people mix up: "grade 0" may be "stage zero".
LOOSE_MEASURES = ("", "stage", "grade", "score")
LABELLED_UNITS = ("", "%", "degree", "bpm")  # of a number that a label may tell apart
