"""Which words are drugs.

The World Health Organization gives related drugs a common stem ("The use of stems in the selection
of International Nonproprietary Names", 2018). So endings find most generic names, also those that
no list of ours holds. A list adds common generic names without a stem. Another maps brands to
generic names, so that "Tylenol" in a dialogue supports "acetaminophen" in its note. A drug that
neither stem nor list finds is no fact.
"""

import re

STEMS = re.compile(
    r"[a-z]+(?:"
    r"pril|sartan|olol|statin|azole|cillin|mycin|micin|cycline|floxacin|gliptin|gliflozin|"
    r"glutide|tidine|triptan|azepam|azolam|caine|tinib|parin|xaban|gatran|setron|dronate|"
    r"dipine|oxetine|profen|coxib|lukast|terol|asone|isone|olone|onide|ciclovir|cyclovir|"
    r"amivir|navir|buvir|thiazide|semide|formin|glitazone|dafil|racetam|barbital|fibrate|grel|"
    r"zosin|dopa|tropium|steride|tadine|trexate|mab|pitant|gestrel|tadiol|ipramine|triptyline|"
    r"pram|giline|peridol|peridone|fenac|oxicam|bactam|penem|ezolid|asteine"
    r")|(?:cef|cephal[eo]|sulfa)[a-z]{3,}"
)
NOT_DRUGS = frozenset(("aldosterone", "april", "cholesterol"))  # a stem matches them
_GENERICS = """
    acetaminophen acetazolamide acetylcysteine adapalene adenosine allopurinol ambroxol
    amiodarone amphetamine apremilast aspirin atropine azathioprine azelastine bacitracin
    baclofen balsalazide benzonatate betahistine bisacodyl bismuth bumetanide buprenorphine
    bupropion buspirone caffeine calamine calcitonin calcitriol calcium cannabidiol capsaicin
    carbamazepine carboplatin carisoprodol carvedilol cetirizine charcoal chlorhexidine
    chlorthalidone cholecalciferol cholestyramine cisplatin clobetasol clonidine clozapine
    codeine colchicine cyclobenzaprine cyclophosphamide cyclosporine dapsone desmopressin
    dextromethorphan dicyclomine digoxin diltiazem dimenhydrinate diphenhydramine diphenoxylate
    dobutamine docusate donepezil doxepin doxorubicin ephedrine epinephrine ergotamine estrogen
    etanercept ethambutol everolimus exenatide ezetimibe fentanyl ferrous fexofenadine
    fingolimod flecainide flumazenil folate folic gabapentin galantamine gemfibrozil glatiramer
    gliclazide glimepiride glipizide glucosamine glyburide glycerin guaifenesin hydralazine
    hydrocodone hydromorphone hydroxychloroquine hydroxyzine hyoscine ifosfamide insulin
    interferon iron isoniazid isosorbide ivermectin ketamine ketorolac ketotifen labetalol
    lactulose lamivudine lamotrigine leflunomide leucovorin levocetirizine levothyroxine
    lisdexamfetamine lithium loperamide magnesium mannitol meclizine melatonin memantine
    meperidine mesalamine mesna metamizole metaxalone methadone methocarbamol methylphenidate
    metoclopramide midodrine minoxidil mirtazapine modafinil morphine mupirocin naloxone
    naltrexone naproxen niacin nicotine nitrofurantoin nitroglycerin norepinephrine octreotide
    olanzapine opium oxybutynin oxycodone oxymetazoline oxytocin paclitaxel pancrelipase
    penicillamine pentoxifylline permethrin phenazopyridine phentermine phenylephrine phenytoin
    pimecrolimus pivmecillinam polymyxin potassium pregabalin primidone probenecid
    prochlorperazine promethazine propofol propylthiouracil pseudoephedrine psyllium
    pyridostigmine pyridoxine quetiapine quinine racecadotril remdesivir ribavirin rifampin
    rifaximin riluzole rivastigmine ropinirole sacubitril salicylate scopolamine senna
    sennosides sertraline simethicone sirolimus somatropin sotalol spironolactone sucralfate
    sulfa tacrolimus tamoxifen tamsulosin tapentadol terbinafine terbutaline testosterone
    theophylline thiamine ticagrelor tirzepatide tizanidine tolterodine topiramate tramadol
    trazodone trimethoprim trospium valproate varenicline venlafaxine verapamil vitamin warfarin
    zinc ziprasidone zolpidem zonisamide
"""
GENERICS = frozenset(_GENERICS.split())
# generic=brands, and its other names
_BRANDS = """
    acetaminophen=dayquil,excedrin,nyquil,paracetamol,tylenol acyclovir=zovirax adalimumab=humira
    albuterol=proair,proventil,salbutamol,ventolin alendronate=fosamax alprazolam=xanax
    amlodipine=norvasc amoxicillin=amoxil,augmentin amphetamine=adderall antacid=maalox,mylanta
    apixaban=eliquis aripiprazole=abilify aspirin=asprin atenolol=tenormin atorvastatin=lipitor
    azithromycin=zithromax betamethasone=celestone botulinum=botox budesonide=pulmicort,symbicort
    bumetanide=bumex bupropion=wellbutrin buspirone=buspar calcium=tums capsaicin=zostrix
    carbamazepine=tegretol carvedilol=coreg ceftriaxone=rocephin celecoxib=celebrex
    cephalexin=keflex cetirizine=zyrtec ciprofloxacin=cipro citalopram=celexa clonazepam=klonopin
    clopidogrel=plavix clozapine=clozaril cyclobenzaprine=flexeril dabigatran=pradaxa
    dapagliflozin=farxiga darifenacin=enablex denosumab=prolia dexlansoprazole=dexilant
    diazepam=valium digoxin=lanoxin diltiazem=cardizem diphenhydramine=benadryl docusate=colace
    donepezil=aricept doxazosin=cardura dulaglutide=trulicity duloxetine=cymbalta
    dutasteride=avodart empagliflozin=jardiance enalapril=vasotec enoxaparin=lovenox
    epinephrine=epipen escitalopram=lexapro esomeprazole=nexium estrogen=premarin etanercept=enbrel
    ezetimibe=zetia famotidine=pepcid fexofenadine=allegra finasteride=proscar fluconazole=diflucan
    fluoxetine=prozac fluticasone=advair,flonase,flovent furosemide=lasix gabapentin=neurontin
    guaifenesin=mucinex,robitussin haloperidol=haldol hydrocodone=lortab,norco,vicodin
    hydromorphone=dilaudid hydroxychloroquine=plaquenil ibandronate=boniva ibuprofen=advil,motrin
    infliximab=remicade insulin=humalog,lantus,levemir,novolog ipratropium=atrovent,combivent
    isotretinoin=accutane ketoconazole=nizoral ketorolac=toradol lamotrigine=lamictal
    lansoprazole=prevacid levetiracetam=keppra levodopa=sinemet levofloxacin=levaquin
    levothyroxine=synthroid,unithroid liraglutide=victoza lisinopril=prinivil,zestril
    loperamide=imodium loratadine=alavert,claritin lorazepam=ativan losartan=cozaar
    meclizine=antivert meloxicam=mobic memantine=namenda meperidine=demerol metformin=glucophage
    methocarbamol=robaxin methylphenidate=concerta,ritalin methylprednisolone=depomedrol,medrol
    metoclopramide=reglan metolazone=zaroxolyn metoprolol=lopressor,toprol metronidazole=flagyl
    midazolam=versed mirtazapine=remeron montelukast=singulair mupirocin=bactroban
    naproxen=aleve,naprosyn nitrofurantoin=macrobid olanzapine=zyprexa olmesartan=benicar
    omeprazole=prilosec ondansetron=zofran oxaprozin=daypro oxybutynin=ditropan
    oxycodone=oxycontin,percocet paclitaxel=taxol pantoprazole=protonix paroxetine=paxil
    phenytoin=dilantin pimecrolimus=elidel polyethylene=miralax pravastatin=pravachol
    pregabalin=lyrica prochlorperazine=compazine promethazine=phenergan pseudoephedrine=sudafed
    quetiapine=seroquel rabeprazole=aciphex ramipril=altace ranitidine=zantac risperidone=risperdal
    rivaroxaban=xarelto rosuvastatin=crestor salicylate=bengay semaglutide=ozempic sertraline=zoloft
    sildenafil=viagra simvastatin=zocor sitagliptin=januvia solifenacin=vesicare
    spironolactone=aldactone sumatriptan=imitrex tadalafil=cialis tamsulosin=flomax
    tazarotene=tazorac telmisartan=micardis ticagrelor=brilinta tiotropium=spiriva
    tizanidine=zanaflex tolterodine=detrol topiramate=topamax tramadol=ultracet,ultram
    trazodone=desyrel triamcinolone=aristocort,kenalog trimethoprim=bactrim valacyclovir=valtrex
    valproate=depakote valsartan=diovan varenicline=chantix venlafaxine=effexor verapamil=tarka
    warfarin=coumadin zolpidem=ambien
"""
_ENTRIES = [entry.split("=") for entry in _BRANDS.split()]
BRANDS = {brand: generic for generic, brands in _ENTRIES for brand in brands.split(",")}


def generic_name(word: str) -> str | None:
    """The generic name of the drug that a lower-case word names; None where it names none."""
    if word in BRANDS:
        return BRANDS[word]
    if word in GENERICS:
        return word
    return word if STEMS.fullmatch(word) and word not in NOT_DRUGS else None
