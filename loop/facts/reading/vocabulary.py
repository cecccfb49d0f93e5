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
HABITS: Phrases[str] = Phrases()
for _habit, _names in {
    "tobacco": "tobacco,smoke,smoking,smoker,smoked,cigarette,cigar,nicotine,vape,vaping,"
    "chewing tobacco,nonsmoker,non smoker,pack year,cigarette smoking",
    "alcohol": "alcohol,drink alcohol,drinking,drinker,drinks,beer,wine,liquor,etoh,ethanol,drink,"
    "alcoholic beverage,whiskey,vodka,nondrinker,non drinker",
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
# What numbers below 10 measure; in speech, most others are "one of them".
MEASURES = {
    name: names.split()[0]
    for names in (
        """a1c hba1c glycohemoglobin; inr; potassium k; creatinine cr; gleason; apgar; gcs; psa;
        stage; grade; hemoglobin hgb hb; calcium ca; albumin; tsh; score; dilated; ph"""
    ).split(";")
    for name in names.split()
}
