"""The tables of the invented clinic: conditions, drugs, past illnesses, allergies and surnames.

They are teaching material only, not medical advice. "|" separates alternatives, {side} becomes left
or right, <a-b> becomes a number in that range.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """One diagnosis with everything that a visit about it can contain."""

    name: str
    complaints: tuple[str, ...]  # noun phrases: "I have ..."
    symptoms: tuple[str, ...]
    denied: tuple[str, ...]  # red flags that the patient does not have
    findings: tuple[str, ...]  # clauses: "on examination ..."
    diagnosis: str
    excluded: tuple[str, ...]  # "no sign of ..."
    drugs: tuple[str, ...]
    tests: tuple[str, ...]
    advice: tuple[str, ...]  # infinitives: "please ..."
    onset: str  # unit of the duration
    follow_up: tuple[str, ...]
    ages: tuple[int, int]
    sex: str  # "woman", "man" or "" for both
    contra: frozenset[str]  # past illnesses that do not fit
    traits: frozenset[str]  # fast (pulse and breathing), lowsat, highbp

    @property
    def lateral(self) -> bool:
        """Whether it is on one side of the body."""
        return "{side}" in self.diagnosis


def _alternatives(text: str) -> tuple[str, ...]:
    """The parts of a text that "|" separates."""
    return tuple(part.strip() for part in text.split("|") if part.strip())


def _condition(
    name: str,
    complaints: str,
    symptoms: str,
    denied: str,
    findings: str,
    diagnosis: str,
    excluded: str,
    drugs: str,
    tests: str,
    advice: str,
    onset: str = "days",
    follow_up: str = "1 week | 10 days | 2 weeks",
    ages: tuple[int, int] = (18, 85),
    sex: str = "",
    contra: str = "",
    traits: str = "",
) -> Condition:
    """A row of the table below; see Condition for its columns."""
    return Condition(
        name,
        _alternatives(complaints),
        _alternatives(symptoms),
        _alternatives(denied),
        _alternatives(findings),
        diagnosis,
        _alternatives(excluded),
        _alternatives(drugs),
        _alternatives(tests),
        _alternatives(advice),
        onset,
        _alternatives(follow_up),
        ages,
        sex,
        frozenset(_alternatives(contra)),
        frozenset(traits.split()),
    )


CHRONIC = "4 weeks | 6 weeks | 8 weeks | 3 months"
SHORT = "2 days | 3 days | 5 days | 1 week"

CONDITIONS = (
    _condition(
        "otitis media",
        "pain in the {side} ear | a strong ache in the {side} ear",
        "fever | muffled hearing | a runny nose | poor sleep | a blocked nose",
        "dizziness | discharge from the ear | ringing in the ear",
        "the {side} eardrum is red and bulging | there is fluid behind the {side} eardrum | "
        "the throat is slightly red | the {side} ear canal is clear",
        "acute otitis media of the {side} ear",
        "mastoiditis | a ruptured eardrum",
        "amoxicillin | cefuroxime | azithromycin | ibuprofen",
        "a hearing test | an ear swab",
        "keep the ear dry | rest at home and drink plenty of water | use a nasal spray at night",
        follow_up=SHORT,
    ),
    _condition(
        "otitis externa",
        "itching and pain in the {side} ear | pain in the {side} ear after swimming",
        "discharge from the ear | muffled hearing | pain when chewing | a feeling of fullness",
        "fever | dizziness | ringing in the ear",
        "the {side} ear canal is swollen and red | pulling on the {side} ear is painful | "
        "the {side} eardrum is intact",
        "otitis externa of the {side} ear",
        "a fungal infection | a boil in the ear canal",
        "ofloxacin ear drops | ciprofloxacin ear drops | hydrocortisone ear drops",
        "an ear swab | cleaning of the ear canal",
        "keep the ear dry | avoid swimming for 2 weeks | stop using cotton buds",
    ),
    _condition(
        "tonsillitis",
        "a sore throat | a painful throat with trouble swallowing",
        "fever | swollen neck glands | tiredness | headache | bad breath",
        "cough | a runny nose | a skin rash | trouble breathing",
        "the tonsils are red and swollen | there is white coating on the tonsils | "
        "the neck glands are swollen and tender",
        "acute tonsillitis",
        "a tonsil abscess | glandular fever",
        "penicillin V | amoxicillin | clarithromycin | ibuprofen",
        "a throat swab | a rapid strep test",
        "rest and drink plenty of fluids | gargle with salt water | "
        "stay home until the fever is gone",
        ages=(18, 50),
        follow_up=SHORT,
    ),
    _condition(
        "sinusitis",
        "pressure and pain over the {side} cheek | pain in the {side} side of the face",
        "a blocked nose | fever | thick nasal discharge | a reduced sense of smell | headache",
        "double vision | neck stiffness | toothache",
        "the {side} cheek is tender to touch | the nasal lining is swollen | "
        "there is pus in the {side} nostril",
        "acute sinusitis on the {side} side",
        "a dental abscess | an orbital infection",
        "amoxicillin | doxycycline | mometasone nasal spray | cefuroxime",
        "a sinus ultrasound | a nasal swab",
        "rinse the nose with salt water | inhale steam twice a day | sleep with the head raised",
    ),
    _condition(
        "bronchitis",
        "a cough with mucus | a deep and noisy cough",
        "a sore throat | tiredness | fever | wheezing | a runny nose",
        "chest pain | coughing blood | shortness of breath | night sweats",
        "there are coarse sounds over both lungs | the throat is mildly red | "
        "breathing is not labored",
        "acute bronchitis",
        "pneumonia | heart failure",
        "ambroxol | salbutamol inhaler | paracetamol | doxycycline",
        "a chest X-ray | a blood test for CRP",
        "drink plenty of warm fluids | avoid smoke | rest for a few days",
    ),
    _condition(
        "pneumonia",
        "a cough with yellow mucus | a cough and pain in the {side} side of the chest",
        "fever | chills | shortness of breath | tiredness | loss of appetite",
        "coughing blood | leg swelling | confusion",
        "there are crackles over the {side} lower lung | "
        "breath sounds are reduced on the {side} side | the {side} lung base is dull on tapping",
        "pneumonia of the {side} lower lobe",
        "a pleural effusion | a lung embolism",
        "amoxicillin | doxycycline | clarithromycin | levofloxacin",
        "a chest X-ray | a blood test for CRP | a sputum culture",
        "stay in bed and drink plenty of fluids | call at once if breathing gets worse",
        follow_up="2 days | 3 days | 4 days",
        traits="fast lowsat",
    ),
    _condition(
        "asthma attack",
        "tightness in the chest and wheezing | shortness of breath at night",
        "a dry cough | poor sleep | a runny nose | tiredness",
        "fever | chest pain | coughing blood | leg swelling",
        "there is wheezing over both lungs | breathing out takes longer than normal | "
        "speaking in full sentences is possible",
        "a mild asthma attack",
        "pneumonia | a collapsed lung",
        "salbutamol inhaler | budesonide inhaler | prednisolone | montelukast",
        "a lung function test | a peak flow diary",
        "avoid dust and smoke | use a spacer with the inhaler | keep the windows closed",
        ages=(18, 60),
        contra="COPD | heart failure",
        follow_up=SHORT,
        traits="fast lowsat",
    ),
    _condition(
        "COPD flare",
        "worse shortness of breath | a stronger cough with more mucus",
        "wheezing | tiredness | chest tightness | green mucus | poor sleep",
        "chest pain | coughing blood | leg swelling | fever",
        "breath sounds are quiet over both lungs | there is wheezing on both sides | "
        "the breathing muscles are working hard",
        "a flare of COPD",
        "pneumonia | heart failure",
        "prednisolone | doxycycline | tiotropium inhaler | salbutamol inhaler",
        "a chest X-ray | a lung function test | a blood gas test",
        "avoid smoke | start breathing exercises | get a flu shot",
        ages=(48, 88),
        contra="asthma",
        follow_up="2 days | 3 days | 5 days",
        traits="fast lowsat",
    ),
    _condition(
        "bladder infection",
        "burning when passing urine | pain in the lower belly when passing urine",
        "frequent urination | cloudy urine | urgent need to urinate | blood in the urine",
        "fever | back pain | vaginal discharge | vomiting",
        "the lower belly is mildly tender | the kidneys are not tender | "
        "the urine strip shows white cells",
        "a bladder infection",
        "a kidney infection | bladder stones",
        "nitrofurantoin | fosfomycin | trimethoprim | pivmecillinam",
        "a urine culture | a urine test",
        "drink at least <2-3> liters a day | empty the bladder often",
        sex="woman",
        follow_up=SHORT,
    ),
    _condition(
        "kidney infection",
        "pain in the {side} flank | pain in the {side} flank with burning urine",
        "fever | chills | nausea | frequent urination | tiredness",
        "blood in the urine | vomiting | diarrhea | a skin rash",
        "the {side} kidney is tender on tapping | the belly is soft | "
        "the urine strip shows nitrite",
        "a kidney infection on the {side} side",
        "a kidney stone | a kidney abscess",
        "ciprofloxacin | cefuroxime | levofloxacin | trimethoprim",
        "a urine culture | a kidney ultrasound | a blood test for CRP",
        "drink at least <2-3> liters a day | come back at once if the fever rises",
        follow_up="2 days | 3 days",
        traits="fast",
    ),
    _condition(
        "kidney stone",
        "cramping pain in the {side} flank | pain from the {side} flank to the groin",
        "nausea | vomiting | blood in the urine | sweating | restlessness",
        "fever | chills | diarrhea",
        "the {side} flank is tender on tapping | the belly is soft | the urine strip shows blood",
        "a kidney stone of <3-7> mm on the {side} side",
        "a kidney infection | a blocked kidney",
        "diclofenac | tamsulosin | metamizole | ibuprofen",
        "a kidney ultrasound | a CT scan of the belly | a urine test",
        "strain the urine through a sieve | drink at least <2-3> liters a day",
        onset="hours",
        contra="heart failure",
        follow_up=SHORT,
        ages=(20, 70),
    ),
    _condition(
        "gastroenteritis",
        "watery diarrhea | vomiting and diarrhea",
        "nausea | stomach cramps | fever | loss of appetite | tiredness",
        "blood in the stool | black stool | severe belly pain | recent travel",
        "the belly is soft with active bowel sounds | the tongue is slightly dry | "
        "there is mild tenderness around the navel",
        "acute gastroenteritis",
        "appendicitis | severe dehydration",
        "ondansetron | loperamide | racecadotril",
        "a stool test | a blood test for kidney values",
        "drink oral rehydration solution | eat bland food | wash hands often",
        follow_up=SHORT,
    ),
    _condition(
        "reflux disease",
        "heartburn after meals | burning behind the breastbone",
        "a sour taste | a dry cough | belching | poor sleep | a hoarse voice",
        "trouble swallowing | weight loss | black stool | vomiting blood",
        "the belly is soft | there is mild tenderness below the ribs | the throat is slightly red",
        "reflux disease",
        "a stomach ulcer | heart disease",
        "omeprazole | pantoprazole | famotidine | esomeprazole",
        "a gastroscopy | a breath test for Helicobacter",
        "avoid late meals | raise the head of the bed by <10-20> cm | avoid coffee and alcohol",
        onset="weeks",
        contra="reflux disease",
        follow_up=CHRONIC,
    ),
    _condition(
        "gastritis",
        "pain in the upper belly | a burning pain in the stomach",
        "nausea | bloating | loss of appetite | belching",
        "weight loss | black stool | vomiting blood | fever",
        "the upper belly is tender | the belly is soft without guarding | bowel sounds are normal",
        "gastritis",
        "a perforated ulcer | gallstones",
        "omeprazole | pantoprazole | famotidine | sucralfate",
        "a gastroscopy | a breath test for Helicobacter | a belly ultrasound",
        "stop taking painkillers | eat small meals | avoid spicy food and alcohol",
        onset="weeks",
        contra="reflux disease",
        follow_up=CHRONIC,
    ),
    _condition(
        "migraine",
        "a throbbing headache on the {side} side | a pulsing pain behind the {side} eye",
        "nausea | vomiting | sensitivity to light | blurred vision | sensitivity to noise",
        "fever | neck stiffness | weakness of the arms",
        "the neck is freely movable | the pupils are equal | the reflexes are equal on both sides",
        "migraine on the {side} side",
        "meningitis | a stroke",
        "sumatriptan | rizatriptan | naproxen | metoclopramide",
        "a headache diary | an MRI of the head",
        "rest in a dark room | keep regular sleep | avoid red wine",
        onset="hours",
        ages=(18, 60),
        contra="migraine",
        follow_up=CHRONIC,
    ),
    _condition(
        "tension headache",
        "a pressing headache on both sides | a dull headache like a tight band",
        "neck pain | poor sleep | tiredness | trouble concentrating",
        "vomiting | fever | double vision | sensitivity to light",
        "the neck muscles are tense | the reflexes are normal | the scalp is tender",
        "tension headache",
        "migraine | meningitis",
        "ibuprofen | amitriptyline | paracetamol | naproxen",
        "a headache diary | physiotherapy for <6-12> sessions",
        "take breaks from the screen | exercise three times a week | drink less coffee",
        onset="weeks",
        follow_up=CHRONIC,
        ages=(18, 70),
    ),
    _condition(
        "back strain",
        "pain in the {side} lower back | pain in the {side} lower back after lifting",
        "stiffness in the morning | pain when bending | muscle cramps | poor sleep",
        "numbness in the legs | loss of bladder control | fever | weight loss",
        "the {side} back muscles are tense | bending forward is painful | "
        "the leg reflexes are normal",
        "a muscle strain of the {side} lower back",
        "a slipped disc | a fracture",
        "ibuprofen | naproxen | tizanidine | paracetamol",
        "physiotherapy for <6-12> sessions | an X-ray of the spine",
        "stay active | use heat on the back | avoid lifting more than <5-10> kg",
    ),
    _condition(
        "sciatica",
        "pain from the lower back into the {side} leg | shooting pain down the {side} leg",
        "tingling in the foot | pain when coughing | numbness of the calf | poor sleep",
        "loss of bladder control | fever | weight loss | leg swelling",
        "raising the {side} leg is painful at <30-60> degrees | the {side} ankle reflex is weak | "
        "the strength of the {side} foot is normal",
        "sciatica on the {side} side",
        "nerve damage | a fracture",
        "naproxen | diclofenac | pregabalin | metamizole",
        "an MRI of the spine | physiotherapy for <6-12> sessions",
        "keep walking short distances | avoid long sitting",
        onset="weeks",
        follow_up="2 weeks | 3 weeks | 4 weeks",
    ),
    _condition(
        "ankle sprain",
        "pain in the {side} ankle after a fall | a swollen {side} ankle",
        "bruising | pain when walking | a feeling of instability | stiffness",
        "numbness in the toes | a popping sound | knee pain",
        "the outer {side} ankle is swollen and tender | the {side} foot has a good pulse | "
        "the {side} ankle bones are not tender",
        "a sprain of the {side} ankle",
        "a fracture | a torn tendon",
        "ibuprofen | diclofenac gel | paracetamol | naproxen",
        "an X-ray of the ankle | an ankle brace for <2-6> weeks",
        "rest and raise the foot | cool the ankle with ice | use crutches",
        ages=(18, 70),
    ),
    _condition(
        "knee arthrosis",
        "pain in the {side} knee | pain in the {side} knee on stairs",
        "stiffness in the morning | swelling | a grinding feeling | pain at night",
        "fever | a recent fall | locking of the knee | numbness in the legs",
        "the {side} knee bends to <90-125> degrees | "
        "there is a small effusion in the {side} knee | the {side} knee grinds on movement",
        "arthrosis of the {side} knee",
        "an infected joint | a torn meniscus",
        "ibuprofen | celecoxib | diclofenac gel | etoricoxib",
        "an X-ray of the knee | physiotherapy for <6-12> sessions",
        "lose <3-10> kg of weight | cycle or swim twice a week",
        onset="months",
        ages=(48, 88),
        follow_up=CHRONIC,
    ),
    _condition(
        "shoulder tendinitis",
        "pain in the {side} shoulder | pain in the {side} shoulder when lifting the arm",
        "pain at night | weakness of the arm | stiffness | neck pain",
        "fever | numbness in the hand | chest pain | a recent fall",
        "the {side} arm lifts to <70-120> degrees | the front of the {side} shoulder is tender | "
        "the strength of the {side} arm is normal",
        "tendinitis of the {side} shoulder",
        "a torn tendon | a frozen shoulder",
        "naproxen | diclofenac | celecoxib | diclofenac gel",
        "a shoulder ultrasound | physiotherapy for <6-12> sessions",
        "avoid work above the head | cool the shoulder with ice",
        onset="weeks",
        ages=(25, 80),
        follow_up=CHRONIC,
    ),
    _condition(
        "gout attack",
        "severe pain in the {side} big toe | a red and hot {side} big toe",
        "swelling | pain at night | fever | trouble walking",
        "a recent injury | chills | a skin wound",
        "the {side} big toe is red and swollen | the {side} big toe is very tender to touch | "
        "the other joints are normal",
        "a gout attack in the {side} big toe",
        "an infected joint | a fracture",
        "colchicine | naproxen | prednisolone | etoricoxib",
        "a blood test for uric acid | a blood test for kidney values",
        "avoid beer and red meat | cool and raise the foot",
        ages=(35, 85),
        contra="gout",
        follow_up=SHORT,
    ),
    _condition(
        "conjunctivitis",
        "a red and sticky {side} eye | burning of the {side} eye",
        "itching | watery discharge | swollen eyelids | a gritty feeling",
        "loss of vision | sensitivity to light | severe eye pain | fever",
        "the {side} eye is red with discharge | the {side} cornea is clear | "
        "the sight of the {side} eye is normal",
        "conjunctivitis of the {side} eye",
        "a corneal ulcer | glaucoma",
        "ofloxacin eye drops | azithromycin eye drops | ketotifen eye drops",
        "an eye swab | a visit to the eye clinic",
        "wash hands often | avoid contact lenses | clean the eyelids with warm water",
        follow_up=SHORT,
    ),
    _condition(
        "shingles",
        "a painful rash on the {side} side of the chest | "
        "burning blisters on the {side} side of the back",
        "itching | tiredness | fever | headache | poor sleep",
        "eye pain | weakness of the arms | shortness of breath",
        "there are grouped blisters on the {side} side | "
        "the skin on the {side} side is very sensitive | the rash stops at the midline",
        "shingles on the {side} side",
        "a bacterial skin infection | meningitis",
        "aciclovir | valaciclovir | pregabalin | paracetamol",
        "a swab of a blister | a blood count",
        "keep the rash clean and dry | avoid contact with pregnant women",
        ages=(40, 88),
        follow_up=SHORT,
    ),
    _condition(
        "cellulitis",
        "redness and swelling of the {side} lower leg | a hot and painful {side} lower leg",
        "fever | chills | tiredness | pain when walking",
        "shortness of breath | chest pain | a recent flight | numbness in the toes",
        "the {side} lower leg is red and warm | the redness measures <6-18> cm | "
        "there is a small wound on the {side} foot",
        "cellulitis of the {side} lower leg",
        "a blood clot in the leg | an abscess",
        "cefalexin | flucloxacillin | clindamycin | doxycycline",
        "a blood test for CRP | a leg vein ultrasound | a wound swab",
        "raise the leg | mark the edge of the redness | come back at once if the redness spreads",
        follow_up="2 days | 3 days",
        traits="fast",
    ),
    _condition(
        "eczema",
        "an itchy rash on the {side} hand | dry and itchy skin on the {side} elbow",
        "poor sleep | cracked skin | burning | redness",
        "fever | contact with new soaps | blisters | joint pain",
        "the skin is red and dry | there are scratch marks | "
        "the skin is thickened on the {side} side",
        "eczema on the {side} side",
        "a fungal infection | scabies",
        "hydrocortisone cream | mometasone cream | cetirizine | tacrolimus ointment",
        "a patch test | a skin scraping",
        "use a moisturizer twice a day | wear gloves for wet work | avoid hot showers",
        onset="weeks",
        follow_up=CHRONIC,
    ),
    _condition(
        "high blood pressure",
        "high blood pressure readings at home | a headache and high readings at home",
        "dizziness | nosebleeds | poor sleep | a racing heart",
        "chest pain | shortness of breath | blurred vision | leg swelling",
        "the heart sounds are normal | there is no leg swelling | "
        "the pulses are equal on both sides",
        "high blood pressure",
        "heart failure | kidney disease",
        "ramipril | amlodipine | lisinopril | losartan | hydrochlorothiazide",
        "an ECG | a blood test for kidney values | a 24-hour blood pressure reading",
        "eat less salt | walk <20-45> minutes a day | write down the blood pressure every day",
        onset="weeks",
        contra="hypertension | heart failure | coronary heart disease",
        ages=(35, 85),
        follow_up=CHRONIC,
        traits="highbp",
    ),
    _condition(
        "type 2 diabetes",
        "constant thirst | thirst and frequent urination",
        "tiredness | weight loss | blurred vision | slow wound healing",
        "vomiting | belly pain | chest pain | numbness in the feet",
        "the fasting glucose is <130-240> mg/dl | the HbA1c is <7-10>.<1-9> % | "
        "the feeling in both feet is normal",
        "type 2 diabetes",
        "ketoacidosis | nerve damage",
        "metformin | sitagliptin | empagliflozin | gliclazide",
        "an eye check | a blood test for kidney values | diabetes training",
        "walk <20-45> minutes a day | avoid sweet drinks | check the feet every day",
        onset="months",
        contra="type 2 diabetes",
        ages=(35, 85),
        follow_up=CHRONIC,
    ),
    _condition(
        "iron deficiency",
        "constant tiredness | tiredness and pale skin",
        "hair loss | dizziness | headache | cold hands",
        "black stool | weight loss | chest pain | night sweats",
        "the hemoglobin is <8-11>.<1-9> g/dl | the ferritin is <4-14> ng/ml | "
        "the eyelids are pale inside",
        "iron deficiency anemia",
        "bleeding in the bowel | leukemia",
        "iron sulfate | iron fumarate | iron gluconate",
        "a stool test for blood | a blood count",
        "eat more beans and red meat | take the tablets with orange juice",
        onset="weeks",
        ages=(18, 75),
        follow_up=CHRONIC,
    ),
    _condition(
        "hay fever",
        "sneezing and an itchy nose | a runny nose and itchy eyes",
        "watery eyes | a blocked nose | poor sleep | an itchy throat",
        "fever | wheezing | shortness of breath | facial pain",
        "the nasal lining is pale and swollen | the eyes are slightly red | the lungs are clear",
        "hay fever",
        "sinusitis | asthma",
        "cetirizine | loratadine | mometasone nasal spray | fexofenadine",
        "a skin prick test | an allergy blood test",
        "rinse the nose with salt water | shower before bed | keep the windows closed",
        onset="weeks",
        ages=(18, 60),
        follow_up=CHRONIC,
    ),
    _condition(
        "vertigo",
        "spinning when turning in bed | spinning when turning to the {side}",
        "nausea | vomiting | unsteady walking | sweating",
        "hearing loss | headache | double vision | ringing in the ear",
        "the test to the {side} triggers spinning | the eyes jerk on turning to the {side} | "
        "walking is normal",
        "positional vertigo of the {side} ear",
        "a stroke | an inner ear infection",
        "dimenhydrinate | betahistine | meclizine",
        "a hearing test | a balance test",
        "do the turning exercise <2-5> times a day | get up slowly | avoid driving for now",
    ),
    _condition(
        "insomnia",
        "trouble falling asleep | waking up many times at night",
        "tiredness | irritability | trouble concentrating | headache",
        "loud snoring | low mood | weight loss | chest pain",
        "the eyes look tired | the thyroid is not enlarged | the heart sounds are normal",
        "insomnia",
        "sleep apnea | depression",
        "melatonin | mirtazapine | doxepin",
        "a sleep diary | a blood test for thyroid values",
        "avoid screens before bed | go to bed at the same time | drink no coffee after noon",
        onset="weeks",
        contra="depression",
        follow_up=CHRONIC,
    ),
)

# name: doses; frequencies; durations in days; classes that an allergy or an illness can forbid
_DRUGS = """
amoxicillin: 500 mg, 750 mg, 1000 mg; two times a day, three times a day; 5, 7, 10; penicillin
penicillin V: 250 mg, 500 mg; three times a day, four times a day; 5, 7, 10; penicillin
flucloxacillin: 250 mg, 500 mg; four times a day; 5, 7, 10; penicillin
pivmecillinam: 200 mg, 400 mg; three times a day; 3, 5, 7; penicillin
cefuroxime: 250 mg, 500 mg; two times a day; 5, 7, 10; penicillin
cefalexin: 500 mg; three times a day, four times a day; 5, 7, 10; penicillin
azithromycin: 250 mg, 500 mg; once a day; 3, 5; macrolide
clarithromycin: 250 mg, 500 mg; two times a day; 5, 7, 10; macrolide
clindamycin: 300 mg, 450 mg; three times a day, four times a day; 5, 7, 10;
doxycycline: 100 mg, 200 mg; once a day; 5, 7, 10; tetracycline
levofloxacin: 500 mg, 750 mg; once a day; 5, 7, 10; quinolone
ciprofloxacin: 250 mg, 500 mg; two times a day; 7, 10, 14; quinolone
nitrofurantoin: 50 mg, 100 mg; two times a day, four times a day; 3, 5, 7; kidney
fosfomycin: 3 g; once a day; 1;
trimethoprim: 100 mg, 200 mg; two times a day; 3, 5, 7; kidney sulfa
ibuprofen: 200 mg, 400 mg, 600 mg; two times a day, three times a day; 3, 5, 7; nsaid
naproxen: 250 mg, 500 mg; two times a day; 5, 7, 10; nsaid
diclofenac: 50 mg, 75 mg; two times a day; 3, 5, 7; nsaid
celecoxib: 100 mg, 200 mg; once a day, two times a day; 7, 10, 14; nsaid
etoricoxib: 60 mg, 90 mg; once a day; 5, 7, 10; nsaid
paracetamol: 500 mg, 1000 mg; three times a day, four times a day; 3, 4, 5;
metamizole: 500 mg, 1000 mg; three times a day, four times a day; 3, 4, 5;
diclofenac gel: 2 g, 4 g; two times a day, three times a day; 7, 10, 14; nsaid
tizanidine: 2 mg, 4 mg; at night, two times a day; 5, 7, 10;
pregabalin: 25 mg, 50 mg, 75 mg; at night, two times a day; 14, 21, 28;
amitriptyline: 10 mg, 25 mg; at night; 28, 42, 56; heart
colchicine: 500 mcg; two times a day, three times a day; 3, 4, 5; kidney macrolide
prednisolone: 20 mg, 30 mg, 40 mg; once a day; 3, 5, 7; steroid
ambroxol: 30 mg, 75 mg; once a day, two times a day; 5, 7;
salbutamol inhaler: 100 mcg, 200 mcg; two times a day, three times a day, four times a day; 5, 7,
    14;
budesonide inhaler: 200 mcg, 400 mcg; two times a day; 14, 28, 42;
tiotropium inhaler: 18 mcg; once a day; 28, 42, 56;
montelukast: 10 mg; at night; 14, 28, 42;
ondansetron: 4 mg, 8 mg; two times a day, three times a day; 2, 3;
loperamide: 2 mg, 4 mg; two times a day; 2, 3;
racecadotril: 100 mg; three times a day; 3, 5;
omeprazole: 20 mg, 40 mg; once a day, two times a day; 14, 28, 56; ppi
pantoprazole: 20 mg, 40 mg; once a day; 14, 28, 56; ppi
esomeprazole: 20 mg, 40 mg; once a day; 14, 28, 56; ppi
famotidine: 20 mg, 40 mg; at night, two times a day; 14, 28; kidney
sucralfate: 1 g; two times a day, four times a day; 14, 28;
sumatriptan: 50 mg, 100 mg; once a day; 1, 2; triptan
rizatriptan: 5 mg, 10 mg; once a day; 1, 2; triptan
metoclopramide: 10 mg; two times a day, three times a day; 2, 3, 5;
tamsulosin: 400 mcg; once a day; 7, 14, 21; alpha
aciclovir: 800 mg; five times a day; 7, 10; kidney
valaciclovir: 1000 mg; three times a day; 7, 10; kidney
ofloxacin ear drops: 4 drops, 6 drops; two times a day; 5, 7, 10; quinolone
ciprofloxacin ear drops: 3 drops, 4 drops; two times a day; 7, 10; quinolone
hydrocortisone ear drops: 2 drops, 4 drops; two times a day, three times a day; 5, 7;
ofloxacin eye drops: 1 drop, 2 drops; four times a day; 5, 7; quinolone
azithromycin eye drops: 1 drop; two times a day; 3; macrolide
ketotifen eye drops: 1 drop; two times a day; 7, 14, 28;
hydrocortisone cream: 1 %, 0.5 %; once a day, two times a day; 5, 7, 10;
mometasone cream: 0.1 %; once a day; 5, 7, 10;
tacrolimus ointment: 0.1 %, 0.03 %; two times a day; 14, 21;
mometasone nasal spray: 50 mcg, 100 mcg; once a day, two times a day; 14, 21, 28;
cetirizine: 5 mg, 10 mg; once a day, at night; 14, 21, 28;
loratadine: 10 mg; once a day; 14, 21, 28;
fexofenadine: 120 mg, 180 mg; once a day; 14, 21, 28;
ramipril: 2.5 mg, 5 mg; once a day; 28, 56, 84; kidney
lisinopril: 5 mg, 10 mg, 20 mg; once a day; 28, 56, 84; kidney
losartan: 25 mg, 50 mg; once a day; 28, 56, 84; kidney
amlodipine: 5 mg, 10 mg; once a day; 28, 56, 84;
hydrochlorothiazide: 12.5 mg, 25 mg; once a day; 28, 56; sulfa gout
metformin: 500 mg, 850 mg, 1000 mg; once a day, two times a day; 28, 56, 84; kidney
sitagliptin: 50 mg, 100 mg; once a day; 28, 56, 84;
empagliflozin: 10 mg, 25 mg; once a day; 28, 56, 84;
gliclazide: 30 mg, 60 mg; once a day; 28, 56, 84; sulfa
iron sulfate: 200 mg, 325 mg; once a day, two times a day; 28, 56, 84;
iron fumarate: 210 mg, 305 mg; once a day, two times a day; 28, 56, 84;
iron gluconate: 300 mg, 325 mg; once a day, two times a day; 28, 56, 84;
dimenhydrinate: 50 mg; two times a day, three times a day; 2, 3, 5;
betahistine: 8 mg, 16 mg, 24 mg; two times a day, three times a day; 7, 14, 28;
meclizine: 25 mg, 50 mg; once a day; 3, 5, 7;
melatonin: 2 mg, 3 mg, 5 mg; at night; 14, 21, 28;
mirtazapine: 7.5 mg, 15 mg; at night; 14, 28, 42;
doxepin: 3 mg, 6 mg; at night; 7, 14, 21; heart
"""

# name: classes of new drugs to avoid; regular medicines. No medicine: it is an operation, which has
# a year. An indented line continues the one before.
_HISTORY = """
hypertension: triptan; lisinopril 10 mg once a day, lisinopril 20 mg once a day,
    amlodipine 5 mg once a day,
    amlodipine 10 mg once a day, losartan 50 mg once a day, ramipril 5 mg once a day,
    bisoprolol 2.5 mg once a day
type 2 diabetes: steroid; metformin 500 mg two times a day, metformin 850 mg two times a day,
    metformin 1000 mg two times a day,
    sitagliptin 100 mg once a day, gliclazide 60 mg once a day
asthma: nsaid; salbutamol inhaler 100 mcg as needed, budesonide inhaler 200 mcg two times a day,
    budesonide inhaler 400 mcg once a day, montelukast 10 mg at night
COPD: none; tiotropium inhaler 18 mcg once a day, salbutamol inhaler 200 mcg as needed,
    budesonide inhaler 400 mcg two times a day
an underactive thyroid: none; levothyroxine 25 mcg once a day, levothyroxine 50 mcg once a day,
    levothyroxine 75 mcg once a day,
    levothyroxine 100 mcg once a day, levothyroxine 125 mcg once a day
high cholesterol: macrolide; atorvastatin 20 mg once a day, atorvastatin 40 mg once a day,
    simvastatin 20 mg at night,
    rosuvastatin 10 mg at night
atrial fibrillation: nsaid heart macrolide quinolone; apixaban 5 mg two times a day,
    rivaroxaban 20 mg once a day,
    edoxaban 60 mg once a day, metoprolol 50 mg two times a day
heart failure: nsaid heart triptan; furosemide 20 mg once a day, furosemide 40 mg once a day,
    bisoprolol 5 mg once a day,
    spironolactone 25 mg once a day
coronary heart disease: nsaid heart triptan macrolide; aspirin 100 mg once a day,
    clopidogrel 75 mg once a day,
    metoprolol 100 mg once a day
gout: gout; allopurinol 100 mg once a day, allopurinol 300 mg once a day,
    febuxostat 80 mg once a day
epilepsy: quinolone; levetiracetam 500 mg two times a day, lamotrigine 100 mg two times a day,
    lamotrigine 50 mg two times a day
depression: triptan heart; sertraline 50 mg once a day, sertraline 100 mg once a day,
    escitalopram 10 mg once a day,
    venlafaxine 75 mg once a day
migraine: none; topiramate 50 mg two times a day, propranolol 40 mg two times a day
reflux disease: nsaid ppi; omeprazole 20 mg once a day, pantoprazole 40 mg once a day,
    esomeprazole 40 mg once a day
osteoporosis: steroid; calcium 500 mg two times a day, vitamin D 1000 units once a day,
    vitamin D 2000 units once a day
chronic kidney disease: nsaid kidney; furosemide 40 mg two times a day,
    calcitriol 0.25 mcg once a day, amlodipine 5 mg once a day
rheumatoid arthritis: nsaid; folic acid 5 mg once a week, hydroxychloroquine 200 mg two times a day,
    sulfasalazine 500 mg two times a day
an enlarged prostate: alpha; tamsulosin 400 mcg once a day, finasteride 5 mg once a day
gallbladder surgery: none;
hernia surgery: none;
appendix surgery: none;
wrist surgery: none;
thyroid surgery: none;
"""

# allergy: the drug class that it forbids
ALLERGIES = {
    "penicillin": "penicillin",
    "amoxicillin": "penicillin",
    "aspirin": "nsaid",
    "ibuprofen": "nsaid",
    "sulfa drugs": "sulfa",
    "erythromycin": "macrolide",
    "ciprofloxacin": "quinolone",
    "doxycycline": "tetracycline",
    "codeine": "",
    "latex": "",
    "peanuts": "",
    "shellfish": "",
    "bee stings": "",
    "cat hair": "",
    "house dust": "",
    "birch pollen": "",
    "nickel": "",
    "contrast dye": "",
    "eggs": "",
    "morphine": "",
    "strawberries": "",
    "walnuts": "",
}

# Illnesses that would be odd in a young patient.
LATE = frozenset(
    {
        "COPD",
        "heart failure",
        "coronary heart disease",
        "atrial fibrillation",
        "osteoporosis",
        "an enlarged prostate",
    }
)

SURNAMES = _alternatives(
    "Weber | Novak | Silva | Kim | Rossi | Meyer | Brown | Clark | Evans | Fischer | Garcia | "
    "Haas | Ivanov | Jensen | Keller | Lopez | Moore | Nguyen | Olsen | Patel | Quinn | Reed | "
    "Santos | Tanaka | Turner | Vogel | Walker | Young | Ziegler | Adams | Becker | Chen | "
    "Dubois | Eriksen | Farah | Green | Hughes | Ito | Jones | Kovacs | Lang | Martin | Nowak | "
    "Okafor | Petrov | Roth | Singh | Torres | Ueda | Varga | White | Yilmaz | Baker | Costa | "
    "Diaz | Fontaine | Hansen | Koch | Larsen | Murphy"
)


@dataclass(frozen=True)
class Drug:
    """How one drug is prescribed."""

    doses: tuple[str, ...]
    frequencies: tuple[str, ...]
    days: tuple[str, ...]
    classes: frozenset[str]  # what allergies and illnesses can forbid


@dataclass(frozen=True)
class Illness:
    """A past illness or operation."""

    avoid: frozenset[str]  # classes of drugs
    medicines: tuple[str, ...]  # taken regularly; (): it is an operation in some year


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _rows(table: str) -> list[tuple[str, list[str]]]:
    """The (name, columns) of a table."""
    rows = []
    for line in table.strip().replace("\n    ", " ").splitlines():
        name, columns = line.split(":")
        rows.append((name, columns.split(";")))
    return rows


DRUGS = {
    name: Drug(_items(doses), _items(frequencies), _items(days), frozenset(classes.split()))
    for name, (doses, frequencies, days, classes) in _rows(_DRUGS)
}
HISTORY = {
    name: Illness(frozenset(avoid.split()), _items(medicines))
    for name, (avoid, medicines) in _rows(_HISTORY)
}
