"""The tiny world's grammar: every sentence it can say, as plain tables.

A {slot} in a sentence is replaced by one of the slot's fillers. `world.py` writes stories from
these tables and recognises their sentences; add to them, and everything else follows.
"""

# Drawn once per story, in its first sentence. {slot} is replaced by one of the slot's fillers.
INTRO = ("The {age} {role} {hero} lived near the {place} with a {animal} named {friend} "
         "and a {thing}.")
STORY_SLOTS = {
    "age": ["old", "young", "quiet", "clever", "lucky"],
    "role": ["sailor", "baker", "gardener", "singer", "painter", "farmer"],
    "hero": ["Mara", "Tobias", "Ines", "Felix", "Greta", "Hugo", "Nora", "Samuel"],
    "place": ["harbour", "mill", "village", "castle", "valley", "station", "bridge", "lake"],
    "animal": ["dog", "cat", "goat", "parrot"],
    "friend": ["Biscuit", "Pepper", "Clover", "Ziggy", "Bramble", "Waffle", "Juno", "Pickle"],
    "thing": ["brass key", "red kite", "glass marble", "paper map", "blue ribbon", "tin box",
              "velvet hat", "wooden horse"],
}
# Drawn anew in every sentence that has the slot.
SENTENCE_SLOTS = {
    "time": ["dawn", "noon", "sunset", "midnight", "supper", "breakfast", "evening", "bedtime"],
    "adj": ["small", "bright", "broken", "golden", "strange", "heavy", "tiny", "pale", "curious",
            "hidden"],
    "tool": ["rope", "hammer", "needle", "candle", "ladder", "wheel", "button", "mirror"],
    "food": ["honey", "cheese", "jam", "cake", "salt", "butter"],
}
# Topic: its nouns, the {noun} of its sentences, and its sentences. Some nouns have two topics.
TOPICS = {
    "sea": (["boat", "anchor", "gull", "lighthouse", "reef", "island", "pier", "storm"], [
        "{hero} sailed past the {adj} {noun} before {time}.",
        "The waves carried {friend} toward the {noun}.",
        "The tide covered the {noun} and left a {adj} shell for {hero}.",
        "Salt wind blew across the {noun} until {time}.",
        "{hero} rowed around the {noun} with the {thing} and some {food}.",
        "Far from the {place}, {friend} watched the {noun} rise from the foam.",
    ]),
    "kitchen": (["oven", "kettle", "pot", "table", "bread", "soup", "spoon", "cup"], [
        "{hero} stirred {food} into the bowl beside the {noun}.",
        "Steam rose from the {adj} {noun} at {time}.",
        "{friend} licked the {noun} clean and asked for {food}.",
        "{hero} set the {noun} on the stove and chopped an onion.",
        "The smell of {food} drifted from the {noun} to the {place}.",
        "Flour fell on the {noun}, on {friend} and on the {thing}.",
    ]),
    "winter": (["sled", "pond", "chimney", "icicle", "scarf", "hill", "star", "path"], [
        "Snow covered the {noun} before {time}.",
        "{hero} pulled {friend} over the ice to the {adj} {noun}.",
        "Frost drew a {adj} {tool} on the {noun}.",
        "{friend} left cold footprints from the {noun} to the {place}.",
        "{hero} built a snowman behind the {noun} and gave it the {thing}.",
        "The {noun} froze, and {friend} skated there until {time}.",
    ]),
    "space": (["rocket", "moon", "star", "comet", "planet", "telescope", "crater", "engine"], [
        "{hero} flew beyond the {adj} {noun} at {time}.",
        "{friend} floated past the {noun} without any weight.",
        "The astronauts gave {hero} a map of the {noun}.",
        "Light from the {noun} took a year to reach the {place}.",
        "{hero} landed beside the {noun} and unpacked the {thing}.",
        "A {adj} robot showed {friend} the orbit of the {noun}.",
    ]),
    "forest": (["oak", "fern", "owl", "path", "mushroom", "stream", "fox", "nest"], [
        "{hero} walked between the trees to the {adj} {noun}.",
        "Leaves rustled above the {noun} at {time}.",
        "{friend} followed the {noun} deep into the woods.",
        "Moss grew on the {noun} where {hero} had lost the {thing}.",
        "{hero} gathered pine cones near the {noun} until {time}.",
        "A {adj} squirrel led {friend} from the {noun} to the {place}.",
    ]),
    "market": (["stall", "basket", "coin", "cart", "boat", "merchant", "cloth", "bread"], [
        "{hero} paid for the {adj} {noun} with a {tool}.",
        "{friend} pushed through the crowd to see the {noun}.",
        "The trader sold {food} from the {noun} until {time}.",
        "{hero} bargained over the price of the {noun}.",
        "Buyers from the {place} admired the {noun} and the {thing}.",
        "{friend} found a cheap {tool} under the {adj} {noun}.",
    ]),
    "music": (["drum", "flute", "song", "fiddle", "choir", "stage", "bell", "piano"], [
        "{hero} tuned the {noun} before {time}.",
        "The melody of the {adj} {noun} reached the {place}.",
        "{friend} kept the rhythm with a {tool} and the {noun}.",
        "The band played until {time}, and {hero} bowed to the {noun}.",
        "{hero} practised on the {noun} beside the {thing}.",
        "A {adj} chord from the {noun} made {friend} turn around.",
    ]),
    "garden": (["rose", "gate", "bee", "spade", "bean", "fence", "pumpkin", "path"], [
        "{hero} watered the {adj} {noun} at {time}.",
        "{friend} dug a hole behind the {noun} and buried the {thing}.",
        "Seeds sprouted around the {noun} before {time}.",
        "{hero} pulled weeds from the soil near the {noun}.",
        "A {adj} butterfly rested on the {noun} next to {friend}.",
        "{hero} carried the {noun} and some {food} to the greenhouse.",
    ]),
}
MOODS = {
    "happy": ["{hero} smiled all the way home.", "A warm laugh came from {friend}.",
              "{hero} danced around the {thing}.", "Nothing could spoil the joy of {friend}.",
              "{friend} felt light and glad until {time}."],
    "afraid": ["{hero} trembled and hid behind the {thing}.", "The heart of {friend} beat fast.",
               "{hero} did not dare to breathe until {time}.",
               "A shiver ran down the back of {friend}.",
               "{friend} felt frightened and wished to be far from the {place}."],
    "sad": ["A tear fell on the {thing}.", "{hero} wept until {time}.",
            "{friend} felt lonely and hung down a heavy head.", "Nobody could comfort {hero}.",
            "{friend} sighed and missed the {place}."],
    "angry": ["{hero} stamped both feet and shouted.", "{friend} growled until {time}.",
              "The face of {hero} turned red.", "{hero} threw down the {thing} in a rage.",
              "{friend} felt cross and would not speak."],
    "eager": ["{hero} wondered what came next.", "{friend} peeked under the {thing} twice.",
              "{hero} had to know more before {time}.", "A riddle kept {friend} awake.",
              "{friend} leaned closer and closer."],
    "proud": ["{hero} stood tall and held up the {thing}.",
              "{friend} had never done anything so well.",
              "Everyone at the {place} praised {hero}.",
              "{hero} felt like a champion until {time}.", "The chest of {friend} swelled."],
    "tired": ["{hero} yawned and rubbed both eyes.", "{friend} could hardly stand until {time}.",
              "The legs of {hero} felt like stones.", "{friend} fell asleep on the {thing}.",
              "{hero} longed for the bed at the {place}."],
    "calm": ["{hero} took a slow breath.", "All was quiet around {friend}.",
             "{hero} rested beside the {thing} without a care.", "Peace settled over the {place}.",
             "{friend} waited gently for {time}."],
}
# The {noun} of a form is one of the chunk's topic; the sentence alone does not show the topic.
FORMS = {
    "question": ["Who left the {noun} here?", "Where did the {adj} {noun} come from?",
                 "Had {friend} ever seen such a {tool}?", "Why was the {noun} so {adj}?"],
    "speech": ['"Look at the {noun}," said {hero}.', '"We are late," said {friend} to {hero}.',
               '"Bring me the {adj} {tool}," called {hero}.',
               '"That is the {noun}," whispered {friend}.'],
    "list": ["They counted the {noun}, the {thing} and the {tool}.",
             "First came the {noun}, then the {tool}, then {friend}.",
             "In the bag lay a {tool}, some {food} and a {adj} stone.",
             "There was room for the {noun}, the {food} and {friend}."],
    "letter": ["Dear {friend}, the {noun} is safe with me.",
               "A note from {hero} said to meet beside the {noun}.",
               "{hero} wrote home about the {adj} {noun}.",
               "The letter in the {thing} spoke of the {noun}."],
    "promise": ["{hero} vowed to guard the {noun} forever.",
                "{friend} gave a word of honour to return before {time}.",
                "From now on {hero} would share the {food} with {friend}.",
                "{hero} swore never to lose the {thing} again."],
    "comparison": ["The {noun} looked like a {adj} {tool}.",
                   "No {food} was ever as {adj} as the {noun}.",
                   "The {noun} seemed bigger than the {place}.",
                   "{friend} was quicker than any {tool}."],
    "sound": ["Crash went the {noun}.", "{friend} heard the {noun} hum and rattle.",
              "A {adj} echo rang from the {noun}.", "Tick, tock, sang the {tool} beside {hero}."],
    "dream": ["At night {hero} dreamed of the {noun}.", "In a dream the {noun} could fly.",
              "{friend} imagined that the {noun} was made of {food}.",
              "Behind closed eyes {hero} saw the {adj} {noun} again."],
}
