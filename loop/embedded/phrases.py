"""What doctor and patient say: the phrasings of each moment of a visit, with facts as {fields}."""

GREET = (
    "Good morning, {title}. What brings you in today?",
    "Hello, {title}. What can I do for you?",
    "Good afternoon, {title}. How can I help?",
    "Come in, {title}. What is the problem?",
    "Welcome, {title}. What is bothering you?",
    "Hello, {title}, please sit down. What is going on?",
    "Hi, {title}. Tell me why you are here.",
    "{title}, good to see you. What is wrong?",
)
OWN_AGE = (
    "I am {age}.",
    "I am {age} years old.",
    "I am {age} now.",
    "I am {age}, as you know.",
    "I just turned {age}.",
)
COMPLAIN_LONG = (
    "I have had {complaint} for {duration}.",
    "It is about {complaint}, for {duration} now.",
    "For {duration} I have had {complaint}.",
    "I came because of {complaint}. It has been {duration}.",
    "Well, I have {complaint}, for about {duration}.",
    "I have been living with {complaint} for {duration}.",
)
COMPLAIN = (
    "I have {complaint}.",
    "It is about {complaint}.",
    "I came because of {complaint}.",
    "Well, I have {complaint}.",
    "Doctor, I have {complaint}.",
    "My problem is {complaint}.",
)
SINCE = (
    "How long have you had this?",
    "Since when?",
    "When did it start?",
    "For how long?",
    "How long has this been going on?",
)
SINCE_REPLY = (
    "For {duration}.",
    "About {duration} now.",
    "It started {duration} ago.",
    "{duration}, I think.",
    "Maybe {duration}.",
    "It has been {duration}.",
)
AGE = (
    ("How old are you?", "I am {age}."),
    ("What is your age?", "I am {age} years old."),
    ("May I ask your age?", "{age}."),
    ("You are {age}, right?", "Yes, I am."),
    ("My file says you are {age}. Is that right?", "Yes, that is right."),
    ("And your age?", "I turned {age} this year."),
)
SYMPTOMS = (
    "Anything else?",
    "Do you have other symptoms?",
    "Have you noticed anything else?",
    "Do you feel anything else?",
    "Is there more?",
    "Any other trouble?",
    "Did anything else come with it?",
)
SYMPTOMS_REPLY = (
    "Yes, {symptoms}.",
    "I also have {symptoms}.",
    "There is also {symptoms}.",
    "I have noticed {symptoms}.",
    "Also {symptoms}.",
    "Yes, I have {symptoms} too.",
    "{symptoms}, I would say.",
)
DENIED = (
    "Any {bare}?",
    "Do you have {denied}?",
    "Have you had {denied}?",
    "What about {denied}?",
    "Is there any {bare}?",
    "Did you notice {denied}?",
)
DENIED_REPLY = (
    "No, no {bare}.",
    "No, not at all.",
    "No, none.",
    "No, luckily not.",
    "No, nothing like that.",
    "No {bare}.",
    "Not that I know.",
)
DENIED_TOO = (
    "But no {bare}.",
    "No {bare}, though.",
    "There is no {bare}.",
    "I have no {bare}.",
    "I noticed no {bare}.",
)
HISTORY_ASK = (
    "Do you have any long-term illness?",
    "Any past illnesses?",
    "Is there anything in your medical history?",
    "Have you been ill before?",
    "Are there other conditions I should know of?",
    "Any other diagnoses or operations?",
)
HISTORY_REPLY = (
    "I have {past}.",
    "Yes, {past}.",
    "I have had {past} for years.",
    "Just {past}.",
    "Only {past}.",
    "There is {past}.",
)
OPERATION_REPLY = (
    "I had {past}.",
    "Yes, {past}.",
    "Just {past}.",
    "Only {past}.",
    "There was {past}.",
)
NO_HISTORY = (
    "No, nothing.",
    "No, I am healthy otherwise.",
    "Not that I know.",
    "Nothing at all.",
    "No, I was always healthy.",
)
MEDICINE_ASK = (
    "Do you take anything for it?",
    "What do you take for that?",
    "Which medicine do you take?",
    "Any regular medicine?",
    "Are you on treatment?",
    "Do you take something for that?",
)
MEDICINE_REPLY = (
    "Just {medicine}.",
    "I take {medicine}.",
    "For that I take {medicine}.",
    "My medicine is {medicine}.",
    "I am on {medicine}.",
    "They gave me {medicine}.",
)
NO_MEDICINE_ASK = (
    "Do you take any medicine?",
    "Any regular medicine?",
    "Are you on any tablets?",
    "Do you take anything regularly?",
    "Do you take tablets every day?",
)
NO_MEDICINE = (
    "I take nothing.",
    "No medicine.",
    "I do not take any medicine.",
    "No regular medicine.",
    "I take no tablets.",
)
ALLERGY_ASK = (
    "Do you have allergies?",
    "Any allergies?",
    "Are you allergic to anything?",
    "Are there any allergies?",
    "Is there an allergy I should know of?",
)
ALLERGY_REPLY = (
    "Yes, to {allergy}.",
    "I am allergic to {allergy}.",
    "I react to {allergy}.",
    "Yes, {allergy}.",
    "Only to {allergy}.",
    "I cannot have {allergy}.",
)
NO_ALLERGY = (
    "No, none.",
    "No allergies.",
    "None that I know of.",
    "No, nothing.",
    "Not that I know.",
)
HABIT_ASK = (
    "Do you smoke or drink?",
    "What about smoking and alcohol?",
    "Any smoking or alcohol?",
    "Do you use tobacco or alcohol?",
    "How about smoking and drinking?",
)
SMOKER = (
    "I smoke {amount}.",
    "Yes, {amount}.",
    "I do smoke, {amount}.",
    "About {amount}.",
    "Sadly yes, {amount}.",
)
DRINKER = (
    "I drink {amount}.",
    "Just {amount}.",
    "Perhaps {amount}.",
    "Yes, {amount}.",
    "About {amount}.",
)
NON_SMOKER = (
    "I do not smoke.",
    "No, I do not smoke.",
    "I never smoked.",
    "No cigarettes for me.",
    "I am a non-smoker.",
)
EXAMINE = (
    "Let me examine you.",
    "Now I will examine you.",
    "Let us have a look.",
    "I would like to examine you now.",
    "Please sit on the couch.",
    "Let me check a few things.",
    "First I will measure a few values.",
)
READY = ("Okay.", "Sure.", "All right.", "Yes, doctor.", "Of course.")
VITALS_OPEN = (
    "Your values: ",
    "The values are ",
    "I measure ",
    "Here we have ",
    "We have ",
    "The nurse noted ",
)
LISTEN = ("Okay.", "I see.", "Is that normal?", "Good to know.", "All right.", "And the rest?")
WORRY = (
    "Is that bad?",
    "Is it serious?",
    "What does that mean?",
    "So what is it?",
    "Okay, and what is it?",
    "Hm, I see.",
)
FINDING = (
    "I see that {finding}.",
    "On examination {finding}.",
    "I find that {finding}.",
    "Here {finding}.",
    "I note that {finding}.",
    "As I see, {finding}.",
)
DIAGNOSE = (
    "You have {diagnosis}.",
    "This is {diagnosis}.",
    "My diagnosis is {diagnosis}.",
    "I think it is {diagnosis}.",
    "It all fits {diagnosis}.",
    "So we are dealing with {diagnosis}.",
)
EXCLUDE = (
    "There is no sign of {excluded}.",
    "I see no sign of {excluded}.",
    "Nothing points to {excluded}.",
    "It does not look like {excluded}.",
    "We can rule out {excluded}.",
)
PRESCRIBE = (
    "I will give you {prescription}.",
    "Please take {prescription}.",
    "I prescribe {prescription}.",
    "We start {prescription}.",
    "You will get {prescription}.",
    "For this you take {prescription}.",
    "Let us try {prescription}.",
)
ASK_PLAN = (
    "What can we do?",
    "And now?",
    "What should I do?",
    "How do we treat it?",
    "Do I need medicine?",
    "What happens next?",
)
TEST = (
    "I will arrange {test}.",
    "We also need {test}.",
    "I would like {test}.",
    "Then we plan {test}.",
    "I order {test} as well.",
    "You will also get {test}.",
)
ADVISE = (
    "Please {advice}.",
    "Also, {advice}.",
    "I want you to {advice}.",
    "Remember to {advice}.",
    "I advise you to {advice}.",
)
RETURN = (
    "Come back in {follow_up}.",
    "I will see you again in {follow_up}.",
    "Let us meet again in {follow_up}.",
    "We check it again in {follow_up}.",
    "Please return in {follow_up}.",
    "See me in {follow_up}.",
)
ACCEPT = (
    "Okay.",
    "All right.",
    "I will do that.",
    "Fine.",
    "Good.",
    "I understand.",
    "That sounds good.",
    "Okay, I can do that.",
)
BYE = (
    "Thank you, doctor.",
    "Thanks a lot.",
    "Thank you. Goodbye.",
    "Good, thank you.",
    "Great, thanks.",
    "Thank you for your help.",
)
CHAT = (
    ("It is cold outside today.", "Yes, and I walked here."),
    ("Did you find a parking space?", "Yes, just outside."),
    ("Sorry for the wait.", "No problem."),
    ("I hope you did not wait long.", "No, it was fine."),
    ("You look worried.", "Yes, a little."),
)
FILLER = ("I see.", "Thank you.", "Okay.", "Good to know.", "All right.", "Understood.", "Hm.")
