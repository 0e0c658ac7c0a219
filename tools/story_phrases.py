# ruff: noqa: E501, SIM905 - lists of words read best on one line, and a template must not be broken
"""The words of the demo model's stories: who can be in one, what can go wrong, how is it said?

Template language, in which story_grammar.py draws:

    [red|blue|]     one of the alternatives, each equally likely; they nest
    {o}             an entry of the cast: H hero, F helper, F1 helper with kind or kinship, S who solves the problem, T the same as a pronoun,
                    k kind of the hero, he him his himself the hero's pronouns, o and w the problem's things, c a colour
    (and) (then) (so) (but) (because) (until)   a seam between two sentences: a full stop, or a conjunction

No sentence between two seams has more than seven words; the seams make the long ones.
"""

# fmt: off
from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that can go wrong, and what solves it."""

    mood: str  # a key of FEELINGS
    things: dict[str, str]  # slot -> its alternatives, separated by "|"; drawn once per story
    setup: tuple[str, ...]  # what the hero has, likes or wants
    event: tuple[str, ...]  # what goes wrong, with its cause
    routes: tuple[str, ...]  # ways to solve it, for a helper or for the hero alone: {S} acts, then {T}
    close: tuple[str, ...]  # what is different afterwards


# ------------------------------------------------------------------------------------------------ the cast

GIRLS = "Anna|Bella|Clara|Daisy|Ella|Fern|Grace|Holly|Ivy|Jess|Kate|Lily|Mia|Nell|Olive|Poppy|Rose|Ruby|Sally|Tess|Wendy|Zoe".split("|")
BOYS = "Adam|Ben|Carl|Dan|Eddie|Finn|George|Hugo|Jack|Karl|Leo|Max|Ned|Oscar|Paul|Simon|Sam|Tom|Victor|Will|Toby|Peter".split("|")
ANIMALS = "fox|rabbit|bear|mouse|cat|hedgehog|squirrel|badger|otter|mole|pig|goat|lamb|pony|beaver|puppy|hare|donkey|raccoon|monkey".split("|")
RELATIONS = {
    "she": "sister|cousin|aunt|grandmother|neighbour|friend".split("|"),
    "he": "brother|cousin|uncle|grandfather|neighbour|friend".split("|"),
}
TRAITS = "small|young|kind|clever|shy|cheerful|brave|gentle|quiet|busy|curious|merry|little|lively|polite|careful".split("|")
COLOURS = "red|blue|green|yellow|white|brown|purple|orange|golden|silver".split("|")
HOMES = (
    "by the river|near the mill|in a village|on a farm|beside the lake|under an oak|in a valley|below the hill|near the harbour|in a hut|by the sea|"
    "in a burrow|above the bakery|behind the windmill|in a cottage|behind the church|on an island|beyond the meadow|in the forest|opposite the market|"
    "along the lane|in a palace|among the hills|outside the castle|under a bridge|inside a lighthouse|at the zoo|in the mountains"
).split("|")
PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}

# ------------------------------------------------------------------------------------------------ the parts that every story has

OPENINGS = (
    "{H} was a {trait} {k}. {he} lived {home}.",
    "{H} the {k} lived {home}.",
    "{H} the {k} lived {home}. {he} was [very|rather|quite] {trait}.",
    "[once|long ago|years ago], there was a {trait} {k}. {his} name was {H}.",
    "a {trait} {k} lived {home}. [everyone|people|friends|they all] called {him} {H}.",
    "there was a {k} [called|named] {H}. {his} home was {home}.",
    "[this is the story of|this is a story about|here is a tale about|let me tell you about] {H}. {he} was a {trait} {k}.",
    "{home} lived a {trait} {k}. {his} name was {H}.",
    "{home}, there lived a {k}. {he} was called {H}.",
    "[have you heard of|do you know|did you ever meet] {H}? {he} is a {trait} {k}.",
    "{H} was the [smallest|kindest|busiest|quietest|happiest|youngest] {k} around. {he} lived {home}.",
    "the [sun|moon|wind|rain|alarm clock] woke {H}. {he} was a {trait} {k}.",
    "[good morning|hello|wake up], {H}! {H} was a {k} {home}.",
    "{H} was a {k}. {he} was a {trait} one.",
)

TIMES = (
    "one day|that afternoon|on Monday|on Friday|on Saturday|after lunch|before supper|one Tuesday|some days later|right then|just then|"
    "on market day|the next day|after breakfast|on the way home|on {his} birthday|suddenly|as luck would have it|quite unexpectedly|"
    "but then|then, one day|by bad luck|out of nowhere|at the weekend|at that moment|after a while|to {his} surprise|that same day|"
    "just after tea|at dinner time|that very week|a moment later|while {he} was singing|on a holiday|as the bell rang"
).split("|")

WEATHER = (
    "it was a [sunny|windy|cloudy|misty|chilly|bright|warm|quiet] [morning|day|afternoon].",
    "the sky was [grey|blue|pink|dark|clear].",
    "the [birds|bees|crickets|frogs] were singing.",
    "[something|it] smelled of [rain|grass|bread|wood].",
    "[leaves|clouds|petals] drifted by.",
    "[everything|the whole world|all around] was [still|quiet|calm].",
)

FEELINGS = {
    "sad": (
        "{he} was [very|so|terribly|quite] sad.", "{H} began to cry.", "tears ran down {his} [cheeks|nose|face].", "{H} wanted to cry.",
        "{his} heart felt [heavy|empty].", "{he} hung {his} head.", "{H} sat down and [sobbed|wept|sniffed].", "{he} could not [smile|laugh|eat].",
        "[poor|oh, poor|unhappy] {H}!", "\"oh no!\" [cried|wailed|sobbed] {H}.", "{H} gave a [long|deep|sad] sigh.", "{he} felt [awful|miserable|unhappy].",
    ),
    "scared": (
        "{he} was [very|so|terribly|quite] scared.", "{H} began to shake.", "{his} [knees|legs|hands] trembled.", "{H} held {his} breath.",
        "{his} heart beat [fast|hard|like a drum].", "{he} did not dare to move.", "{H} [squeaked|gasped|shivered] with fright.",
        "{he} hid under [a blanket|the table|a bush].", "\"help!\" [cried|whispered|called] {H}.", "{H} turned [pale|cold|white].", "{he} felt [afraid|frightened|small].",
    ),
    "angry": (
        "{he} was [very|so|terribly|quite] angry.", "{H} stamped {his} foot.", "{his} [face|nose|ears] went red.", "{H} frowned and [sulked|grumbled|growled].",
        "{he} kicked a [stone|bucket|pebble].", "{he} folded {his} arms.", "\"not fair!\" [shouted|cried|yelled] {H}.", "{H} wanted to shout.",
        "{he} [grumbled|muttered|growled] all [day|morning|evening].", "{he} felt [cross|furious|angry].", "what a bad mood {he} was in!",
    ),
    "worried": (
        "{he} was [very|so|terribly|quite] worried.", "{H} bit {his} lip.", "{he} walked up and down.", "{H} did not know what to do.",
        "{he} scratched {his} [head|ear|chin].", "{his} tummy felt [tight|strange|funny].", "\"what now?\" [asked|whispered|said] {H}.",
        "{H} could not [sleep|sit still|think].", "{he} felt [nervous|troubled|uneasy].", "{H} looked [left and right|up and down|around and around].",
        "\"oh dear,\" [said|sighed|mumbled] {H}.", "this was [bad|terrible|serious] news.",
    ),
    "lonely": (
        "{he} was [very|so|terribly|quite] lonely.", "{H} sighed [softly|sadly|quietly].", "nobody [waved|smiled|spoke] to {him}.", "{he} felt [lonely|alone|forgotten].",
        "{H} talked to {his} [shadow|spoon|pillow].", "{he} [ate|played|walked] all alone.", "\"if only I had company,\" [said|sighed] {H}.",
        "{his} days were [long|grey|empty].", "{H} looked out of the window.", "the evenings felt [long|cold|endless].",
    ),
}

MEETINGS = (
    "[just then|soon|luckily|by chance|at last], {F1} came by.", "{F1} [heard|saw|found|noticed] {him}.", "{he} [ran|went|hurried|walked] to {F1}.",
    "{F1} [lived next door|was not far away|was passing].", "{F1} [stopped|looked up|put down a basket].", "along came {F1}.",
    "who could help? {F1} could!", "{he} thought of {F1}.", "{F1} knocked at the door.", "{H} called {F1}.",
    "that was when {F1} appeared.", "{his} [sister|cousin|brother] sent for {F1}.",
)

TALKS = (
    "\"what is [wrong|the matter]?\" asked {F}. {H} [explained|told {fhim}|pointed].", "\"why are you so [quiet|glum|upset]?\" asked {F}.",
    "{H} told {fhim} [everything|the whole story|what had happened].", "\"[do not worry|cheer up|never mind|stay calm],\" said {F}.",
    "\"can you help me?\" asked {H}. \"[of course|yes|gladly]!\" said {F}.", "\"I [can|will|want to] help you,\" said {F}.", "{F} [listened kindly|nodded|smiled|thought for a while|had a look].",
    "\"I have [an idea|a plan],\" said {F}.", "\"leave it to me,\" [said|laughed] {F}.", "\"we can [fix|solve|manage] this,\" said {F}.",
    "{F} [took {his} hand|put an arm around {him}|gave {him} a hug].", "\"[come with me|follow me|let us try],\" said {F}.", "",
)

IDEAS = (
    "then {he} had [an idea|a good idea|a plan].", "but {H} did not give up.", "{H} thought [hard|for a long time|and thought].",
    "\"I can [do|fix|manage] this,\" {he} said.", "{H} took a deep breath.", "{he} counted to [three|five|ten].", "{H} rolled up {his} sleeves.",
    "nobody was there to help. {H} [tried alone|had to be brave|used {his} head].", "\"think, {H}, think!\" {he} told {himself}.",
    "\"[be brave|stay calm|keep going],\" {H} told {himself}.", "{he} remembered what {his} [mother|father|teacher] said.",
    "at last, {he} [stood up|made a plan|knew what to do].",
)

JOYS = (
    "{H} was happy again.", "{H} [laughed|cheered|sang] [again|with joy|out loud].", "\"[hooray|hurrah]!\" [cried|shouted] {H}.", "{H} danced [in a circle|with joy|around the table].",
    "how [happy|glad|pleased] {H} was!", "{H} clapped {his} hands.", "a [big|warm|wide] smile came back.", "{H} felt [warm inside|much better|proud and glad].",
    "{H} jumped [for joy|up and down].", "all was well [again|at last|now].", "{his} [worries|troubles] were [gone|over].", "{H} [hummed|sang|whistled] a [merry|happy|little] tune.",
)

THANKS = (
    "\"thank you, {F}!\" [said|cried] {H}.", "{H} hugged {F} [tightly|for a long time|twice].", "{he} gave {F} [an apple|a flower|a biscuit|some honey].",
    "the two [shared a cake|drank cocoa|ate some soup|danced a little].", "\"you are [kind|clever|wonderful],\" {H} told {F}.",
    "{H} and {F} [became|stayed|were] best friends.", "{H} thanked {F} [again and again|with a kiss|from the heart].", "\"I am so lucky,\" {H} told {F}.",
    "\"friends do such things,\" said {F}.", "{F} [smiled|winked|laughed] and went home.", "they [walked|skipped|ran] home [together|hand in hand].",
)

ENDINGS = (
    "that night, {H} slept [well|soundly|deeply].", "it had been a [good|long|fine|wonderful] day.", "the end.", "and that was that.", "everyone was [content|glad|happy].",
    "the [moon|stars|sun] [smiled|shone|looked] down.", "what a [day|lucky day|fine end]!", "{H} never forgot [it|that day].", "and so it ended well.",
    "{H} [told|wrote] {his} [mother|father] all about it.", "then it was time for [bed|supper|tea].", "{he} [dreamed|thought] about it all night.", "they still [laugh|talk|sing] about it.",
    "good night, {H}!", "after that came a [quiet|peaceful|cosy] evening.", "", "",
)

LESSONS = (
    "{H} had learned [something|a lesson].", "[patience|courage|kindness|a clear head] [helps|wins in the end].", "{he} felt a little [braver|wiser|older|taller].",
    "from then on, {he} [worried less|took more care|smiled more].", "", "", "", "",
)

# ------------------------------------------------------------------------------------------------ what can go wrong

PROBLEMS = (
    Problem(
        "sad",
        {"o": "kite|cap|scarf|ribbon|hat", "w": "in the willow|on the roof|in the oak|in the elm|on the tower"},
        ("{H} had a {c} {o}. [{he} loved it|it was brand new|it was {his} treasure].", "{his} {c} {o} came from [grandma|an aunt|a sailor].",
         "{H} [went out|played outside] with {his} {c} {o}."),
        ("[the wind|a gust|a storm] [pulled|tore|snatched] the {o} away (and) it [landed|got caught|hung] {w}.",
         "the {o} [flew off|blew away|took off] in [the wind|a gust|a storm] (and) it stuck {w}.",
         "[it blew hard|the wind grew strong|a storm came up] (and) the {o} [sailed|flew|went] up {w}."),
        ("{S} [fetched|found|borrowed|brought] a ladder (then) {T} [climbed|crept|went] up [slowly|step by step|with care]. {T} [pulled|shook|lifted] the {o} [free|loose|down].",
         "{S} [cut|found|took] a long [stick|pole|branch] (then) {T} [poked|pushed|tapped] the {o}. down it [came|fell|floated]!",
         "{S} [called|asked|begged] a [crow|raven|seagull] for help. the bird [flew up|flapped up|rose] (and) it [dropped|brought down|threw down] the {o}."),
        ("{he} [held|gripped] the {o} [tightly|with both hands].", "the {o} [was not even torn|had only a tiny hole|was safe].", "{H} tied a string to the {o}."),
    ),
    Problem(
        "worried",
        {"o": "key|coin|ring|button|whistle|marble", "w": "under the bed|in a boot|behind the stove|in the grass|under a leaf|in the teapot"},
        ("{H} [owned|had] a {c} {o}. {he} kept it in {his} pocket.", "{H} always carried a {c} {o}.", "[grandpa|a pirate|a peddler] gave {H} a {c} {o}."),
        ("the {o} was [gone|missing|lost] (because) {his} pocket [had a hole|was torn|was open].",
         "{H} [reached|felt] into {his} pocket (but) the {o} [was not there|had slipped out|had fallen through].",
         "{he} [ran|jumped|tumbled] too wildly (and) the {o} [fell out|rolled away|dropped] somewhere."),
        ("{S} [lit a lantern|took a candle|brought a lamp] (then) {T} [searched|looked into] every corner. the {o} [lay|gleamed|sparkled] {w}.",
         "{S} [walked|went|crept] the same way back (then) {T} [looked|peeked|searched] everywhere. there it was, {w}!",
         "{S} [swept|cleaned|tidied] the whole house (and) [something|a tiny thing] [clinked|flashed|rattled] {w}. it was the {o}!"),
        ("then {he} [sewed up|mended|closed] the hole.", "{H} [hung|tied] the {o} on a string.", "now the {o} lives in a box."),
    ),
    Problem(
        "sad",
        {"o": "cart|wagon|bicycle|scooter|wheelbarrow", "w": "stone|root|fence|gatepost"},
        ("{H} [built|painted|owned] a {c} {o}.", "{H} rode {his} {c} {o} [downhill|to town|everywhere].", "{his} {o} was {c} and [fast|shiny|new]."),
        ("the {o} [hit|bumped into|struck] a {w} (and) a wheel [came off|broke|flew away].",
         "{H} went [too fast|downhill] (and) the {o} [crashed into|ran against] a {w}. a wheel [cracked|snapped].",
         "a {w} was in the way (so) the {o} [tipped over|toppled]. a wheel broke."),
        ("{S} [made|cut|carved] a wheel [from oak|out of wood|from a log] (then) {T} [nailed|fixed|screwed] it on.",
         "{S} [brought|fetched|found] [glue|nails] and a hammer (then) {T} [mended|repaired|fixed] the wheel.",
         "{S} [used|took|found] the lid of a pot (and) it [made|became|was] a [fine|perfect|funny] wheel."),
        ("soon the {o} [rolled|ran|rattled] [again|along].", "{H} [drove|rode] more slowly [now|after that].", "the {o} [squeaked|shone|was fast] like before."),
    ),
    Problem(
        "worried",
        {"o": "beans|roses|carrots|tulips|pumpkins|strawberries"},
        ("{H} had planted {o}.", "{H} [loved|cared for|grew] {his} {o}.", "{o} grew [behind the house|in {his} garden]."),
        ("[it had not rained|no rain fell] for weeks (so) the {o} [hung their heads|were drying up|turned brown].",
         "the sun burned [all month|every day] (and) the {o} [got thirsty|wilted|drooped].",
         "the {o} [drooped|wilted|looked ill] (so) {H} [felt|touched] the soil. it was [dry as dust|too dry]."),
        ("{S} [carried|brought|fetched] [water|ten buckets] from the [well|pond|stream] (then) {T} [watered|soaked] every plant.",
         "{S} [dug|made] a [little|narrow|long] ditch (and) water [ran|flowed] from the stream.",
         "{S} [put|set] barrels under the roof (and) that night, [rain filled them|it poured]. {T} watered the {o}."),
        ("the {o} [stood up|grew tall|recovered].", "soon the {o} [were fresh|looked green] again.", "[a week later|in June], they picked {o}."),
    ),
    Problem(
        "angry",
        {"o": "pie|cake|bread|pudding|cheese|jam", "w": "mouse|sparrow|kitten|crow|piglet"},
        ("{H} had [made|prepared] some {o}.", "there was {o} on the table.", "{H} [loved|wanted] {o} for supper."),
        ("[half|most] of the {o} was [gone|eaten] (and) crumbs led [outside|to the shed|behind the stove].",
         "[somebody|someone] had [stolen|nibbled] the {o} (and) [tiny|small] footprints led [outside|away].",
         "{H} [came back|turned around|looked up] (but) the {o} had [vanished|disappeared]."),
        ("{S} followed the [crumbs|trail|footprints] (then) {T} [found|met|saw] a [thin|hungry] {w}. it [had not eaten|was starving], so {T} shared.",
         "{S} hid [behind the door|under the table] (and) a [thin|hungry] {w} [crept|came] in. {T} [offered it|gave it] some milk.",
         "{S} set a trap [of flour|with a bell] (and) a hungry {w} [walked|ran] into it. {T} [fed|forgave] it."),
        ("the {w} became {his} friend.", "the {w} said [sorry|thank you].", "they [made|baked] more {o} together."),
    ),
    Problem(
        "worried",
        {"o": "cart|wagon|sledge|carriage|tractor", "w": "hay|apples|milk|potatoes|firewood"},
        ("{H} drove {his} {o} to [market|town].", "{his} {o} was full of {w}.", "{H} had to [deliver|sell] {w} [in town|that day]."),
        ("the [road|lane|path] was [wet|soft|muddy] (so) the {o} [sank|got stuck|stopped].",
         "[it had rained|rain had poured] all night (and) the {o} [stuck|sank] in the mud.",
         "the wheels [spun|turned] and [spun|turned] (but) the {o} stayed in the mud."),
        ("{S} [laid|pushed|put] [planks|branches|straw] under the wheels (then) {T} [pulled|pushed|heaved] hard.",
         "{S} [tied|fastened] a rope to the {o} (then) {T} [pulled|tugged|heaved] until it moved.",
         "{S} [took off|unloaded|carried away] the {w} (and) the light {o} [came out|rolled out|moved]."),
        ("the {w} [arrived|got there] in time.", "{H} sold all the {w}.", "with a [plop|jerk|splash], it was free."),
    ),
    Problem(
        "worried",
        {"o": "bridge|footbridge|jetty", "w": "grandmother|uncle|aunt|cousin"},
        ("{H} wanted to visit {his} {w}.", "{his} {w} lived across the stream.", "{H} had a [basket|letter|present] for {his} {w}."),
        ("[a flood|the flood|high water] had [washed away|broken|torn off] the {o} (and) the water was [deep|wild|cold].",
         "the {o} was [gone|broken|under water] (so) {H} [could not cross|stood there|had to stop].",
         "[rain|snow] had made the stream [wild|big] (and) the {o} [had collapsed|was broken]."),
        ("{S} [rolled|pushed|dragged] a [log|trunk] over the water (then) {T} [crawled|walked|balanced] across.",
         "{S} [threw|dropped|laid] [big|flat] stones into the stream (then) {T} [hopped|jumped|stepped] over.",
         "{S} [built|made|tied] a raft [of branches|from barrels] (then) {T} [paddled|floated|rowed] to the other side."),
        ("{his} {w} [waved|waited] on the other side.", "{his} {w} had baked a cake.", "later, they built a new {o}."),
    ),
    Problem(
        "scared",
        {"o": "branch|shutter|sign|gate", "w": "tapping|knocking|scratching|creaking|banging"},
        ("{H} did not like the dark.", "{H} lay in bed. the [lamp|candle] was out.", "it was [night|late] and [very dark|pitch black]."),
        ("[there was|{he} heard] [strange|loud|spooky] {w} [outside|nearby|somewhere] (and) it [did not stop|came closer|grew louder].",
         "something went {w} [outside|at the window] (and) {H} [thought of|imagined] a [monster|ghost|giant].",
         "[loud|strange] {w} [woke|startled] {him} (and) [there it was again|it got louder]."),
        ("{S} [lit|took|held up] a [lamp|candle|lantern] (then) {T} [looked|went|peeked] outside. it was only a {o}!",
         "{S} [opened|unlocked] the window (then) {T} saw [a loose|an old] {o}. the wind moved it.",
         "{S} [tiptoed|crept|marched] to the door (and) outside [hung|swung] a loose {o}. no monster at all!"),
        ("{T} tied the {o} [with a string|down|firmly].", "then the {w} stopped.", "{H} [laughed at|waved to] the {o}."),
    ),
    Problem(
        "scared",
        {"w": "song|poem|story|riddle", "o": "quilt|blanket|tent|pillow"},
        ("{H} [was alone|sat] in {his} room.", "{H} was [drawing|reading|knitting].", "dark clouds [came|rolled] in."),
        ("there was a [flash|bang|crash] (and) thunder [rolled|shook the house|filled the sky].",
         "lightning [lit|split] the sky (and) the [windows|walls|cups] [shook|rattled].",
         "[a thunderstorm|a big storm] [began|broke out] (and) the thunder [roared|boomed|cracked]."),
        ("{S} [made|built] a cave [from|with] a {o} (then) {T} sat inside [with cookies|until it ended|and giggled].",
         "{S} [counted|measured] from [flash|light] to thunder (and) the storm [moved|went] away. {T} could hear it.",
         "{S} [knew|made up|began] a {w} about [thunder|giants|rain] (and) it was louder than the storm."),
        ("soon the [storm|thunder] was over.", "a rainbow [stood over|shone above] the roofs.", "{H} [wanted|asked for] one more {w}."),
    ),
    Problem(
        "lonely",
        {"o": "cookies|pancakes|apples|lanterns|balloons"},
        ("{H} had just moved there.", "{H} was new in that place.", "{H} did not know anyone."),
        ("[{he} had nobody|nobody played with {him}] (because) [{his} friends lived far away|everyone was a stranger|all doors were closed].",
         "the others played [ball|tag|games] (but) {H} [was too shy|only watched|stayed behind a tree].",
         "[no one|nobody] [came|visited|knocked] all week (because) [no one knew {him}|the house stood far away]."),
        ("{S} [made|prepared|brought] {o} for everyone (then) {T} [knocked at|went to] every door. [people|children] [smiled|came out].",
         "{S} [painted|wrote|hung up] a [sign|poster] (then) {T} [waited|set the table]. [ten|seven|twelve] neighbours came.",
         "{S} [asked|invited|called] the others to a [party|picnic|game] (and) [all|most] of them came. {T} shared {o}."),
        ("now {H} had [three|four|many] friends.", "they [played|laughed|sang] until dark.", "the {o} were eaten in minutes."),
    ),
    Problem(
        "angry",
        {"o": "ball|kite|drum|boat|puzzle|sledge", "w": "rabbit|boy|girl|cat|hedgehog"},
        ("{H} had a {c} {o}.", "{H} [loved|played with] the {c} {o}.", "a {w} [wanted|liked] {his} {c} {o}."),
        ("a {w} [grabbed|took|wanted] the {o} (and) they [pulled|fought|quarrelled] [over it|for an hour].",
         "\"it is mine!\" [said|shouted] the {w}. they [pulled|fought] (until) the {o} [cracked|fell down|got dirty].",
         "{H} did not share (so) the {w} [ran off with|took away|hid] the {o}."),
        ("{S} [brought|fetched|set up] [a clock|an hourglass|a bell] (and) each [got|had] [a turn|ten minutes] with the {o}.",
         "{S} [smiled at|talked to|sat down with] the {w} (then) {T} [played|used the {o}] together.",
         "{S} [made|thought of|knew] a game for [both|two|everybody] (and) the {o} was [part of it|shared]."),
        ("sharing was [fun|better|easy].", "the {w} [laughed|smiled] too.", "the {o} was [more fun|better] with two."),
    ),
    Problem(
        "worried",
        {"o": "cup|vase|plate|teapot|jug|bowl", "w": "mother|father|grandmother|grandfather"},
        ("{H} [danced|jumped|ran] [around|through] the kitchen.", "{his} {w} had a {c} {o}.", "on the shelf stood a {c} {o}."),
        ("{H} [knocked over|dropped|bumped] the {o} (and) it broke [in two|into pieces].",
         "the {o} [slipped|fell] from the [shelf|table] (because) {H} [was careless|had bumped it|was in a hurry].",
         "[crash|bang]! {H} had broken the {o} (so) {he} [hid it|told nobody|swept it away]."),
        ("{S} [found|brought|got] some glue (then) {T} [put|stuck] it together. then {H} told {his} {w} the truth.",
         "{S} [said|thought]: [always tell the truth|a lie makes it worse] (so) {H} [went|ran] to {his} {w} and confessed.",
         "{S} [made|painted|formed] a [new|clay|wooden] {o} (and) {H} [gave|brought] it to {his} {w}."),
        ("{his} {w} was not angry.", "{his} {w} [forgave|kissed|hugged] {him}.", "\"[how honest|good child|well done],\" said {his} {w}."),
    ),
    Problem(
        "worried",
        {"o": "mittens|socks|gloves|slippers|leggings"},
        ("winter came, [cold and white|with ice]. {H} had no {o}.", "{his} {o} [had holes|were too old].", "snow fell. {H} [looked for|missed] {his} {o}."),
        ("the [wind|air|frost] was [icy|bitter] (and) {H} [shivered|froze|could not go out].",
         "{H} [went|stepped] outside (but) without {o} {he} [froze|was freezing].",
         "moths had [eaten|chewed] the {o} (so) {H} [had to|could only] stay [indoors|by the fire]."),
        ("{S} [found|bought|spun] some [soft|thick|{c}] wool (then) {T} [knitted|made] new {o}.",
         "{S} [opened|searched] an old [chest|trunk] (and) in it [were|lay] warm {o}.",
         "{S} [cut up|took] a [thick|{c}] blanket (then) {T} [sewed|stitched] {o} [from|out of] it."),
        ("the {o} were [warm|soft|a bit big].", "{H} built a snowman [at once|in them].", "now the snow was fun."),
    ),
    Problem(
        "scared",
        {"o": "fog|snow|darkness|mist", "w": "mushrooms|berries|nuts|flowers|acorns"},
        ("{H} went to pick {w}.", "{H} [walked|wandered] [far|deep] into the woods.", "{H} wanted {w} for {his} [mother|father]."),
        ("the {o} [came|grew thick|closed in] (and) {H} [lost|could not see|missed] the path.",
         "{he} had [looked at {w}|followed a butterfly|gone too far] (and) now {he} was lost.",
         "[all|the] trees [looked the same|were only shadows] (and) the way home [was gone|had vanished]."),
        ("{S} [heard|listened to] [a bell|the church bell|a dog] (then) {T} [followed|walked towards] the sound.",
         "{S} [found|followed|remembered] the [stream|brook] (because) it [runs|flows] [to|past] the house.",
         "{S} [looked for|saw|pointed at] [the north star|some chimney smoke|mossy trunks] (then) {T} [knew the way|went that way]."),
        ("soon {he} saw {his} house.", "home [smelled of|was full of] soup.", "the {w} were [still fresh|delicious]."),
    ),
    Problem(
        "worried",
        {"o": "sparrow|robin|owl|swallow|starling", "w": "oak|birch|pear tree|hedge|barn"},
        ("{H} [heard|noticed] a [soft|tiny|thin] [cry|peep].", "something [moved|peeped] in the grass.", "{H} [found|saw] a [baby|tiny] {o}."),
        ("a [baby|young|small] {o} [fell|tumbled|dropped] from its nest (because) the wind [shook|rocked|bent] the {w}.",
         "the [old|little] nest [was broken|had tipped] (and) a baby {o} [lay|sat] [below|in the grass].",
         "the [baby|little] {o} could not fly (and) a cat was [near|coming|watching]."),
        ("{S} [put up|leaned|set] a ladder (then) {T} [carried|took|lifted] the {o} [home|up].",
         "{S} [made|wove|built] a nest [from straw|of moss|in a basket] (then) {T} [hung|put] it [up|in the {w}].",
         "{S} [fed it|gave it] [worms|crumbs|seeds] for a week (and) the {o} [grew|became] strong. then it flew."),
        ("the mother {o} sang [for them|all night].", "the {o} [chirped|waved] a thank you.", "[every spring|each morning], the {o} visits {him}."),
    ),
    Problem(
        "worried",
        {"o": "lamb|kitten|calf|duckling|puppy", "w": "fence|net|bush|hedge"},
        ("{H} heard a [sad|loud|weak] cry.", "{H} [walked|strolled] across the field.", "a {o} lived on the farm."),
        ("a {o} [hung|was caught|was stuck] in the {w} (because) it had [chased a bee|wanted fresh grass|run too fast].",
         "a {w} held a [poor|small|frightened] {o} (and) it [kicked|cried|pulled] in vain.",
         "the {o} had [slipped|crawled] into a {w} (and) it could not get [out|free]."),
        ("{S} [cut|opened|loosened] the {w} with [scissors|a knife|pliers] (then) {T} [freed|pulled out] the {o}.",
         "{S} [held|calmed|stroked] the {o} (then) {T} [bent|lifted|pushed] the {w} [apart|aside].",
         "{S} [dug|scraped] a hole under the {w} (and) the {o} [slipped|crawled|wriggled] out."),
        ("the {o} [licked|nuzzled|kissed] {his} hand.", "the {o} [ran|trotted] to its mother.", "the {o} [follows {him} everywhere|was not hurt]."),
    ),
    Problem(
        "worried",
        {"o": "soup|tea|porridge|broth", "w": "grandmother|grandfather|mother|sister|brother"},
        ("{H} [lived with|loved] {his} {w}.", "{his} {w} [stayed in bed|did not get up].", "{H} [called|looked for] {his} {w}."),
        ("{his} {w} had a [bad cold|high fever|sore throat] (because) [the rain had soaked {his} bed|the stove was out|the roof leaked].",
         "{his} {w} [sneezed|coughed] all night (and) {his} {w} felt [weak|ill|hot].",
         "{his} {w} was ill (and) the [doctor|nurse] was [away|far off|in town]."),
        ("{S} [cooked|boiled|made] [hot|some] {o} with [herbs|ginger|honey] (then) {T} [carried|brought] it to the bed.",
         "{S} [lit|warmed|fed] the stove (then) {T} made a pot of {o}.",
         "{S} [picked|gathered|found] [mint|thyme|lemons] (then) {T} put them in the {o}."),
        ("{his} {w} [got well|got up] [in two days|by Sunday].", "\"this {o} is magic,\" said {his} {w}.", "soon {his} {w} was [strong|healthy|up] again."),
    ),
    Problem(
        "sad",
        {"o": "apple|pear|plum|cherry|peach"},
        ("{H} [was hungry|wanted a snack].", "a [ripe|big|sweet] {o} hung on a tree.", "{H} [saw|dreamed of] a [ripe|big|sweet] {o}."),
        ("the {o} [hung|grew] too high (and) {H} was too [small|short].",
         "{he} [jumped|stretched|hopped] and [jumped|stretched|hopped] (but) the {o} [was|stayed] out of reach.",
         "{H} could not [reach|get|touch] the {o} (because) [{his} arms were short|the tree was tall]."),
        ("{S} [pushed|rolled|dragged] a [box|barrel|bench] under the tree (then) {T} [reached|picked] the {o}.",
         "{S} [shook|bumped|kicked] the tree (and) the {o} [fell|dropped] [down|in the grass].",
         "{S} [found|took] a [rake|broom|crook] (then) {T} [hooked|pulled down|caught] the {o}."),
        ("the {o} [tasted|was] [sweet|juicy].", "{T} [planted|kept] the [seed|stone].", "{H} [ate|shared|licked] it slowly."),
    ),
    Problem(
        "sad",
        {"o": "race|contest", "w": "hare|fox|goose|pony"},
        ("there was a {o} [every year|in May].", "{H} wanted to win the {o}.", "a {w} [always won|laughed at {him}]."),
        ("{H} [stumbled|tripped|fell] [at the start|in practice] (and) the {w} [laughed|giggled].",
         "{H} was [much too|far too] slow (because) {his} [legs|shoes|oars] were [weak|heavy].",
         "\"you will never win,\" said the {w} (and) {H} believed it."),
        ("{S} [suggested|tried|began] [early runs|hill runs|a morning run] (and) {H} got [faster|better|stronger].",
         "{S} [knew|learned|found] a trick: [breathe slowly|small steps|start calmly] (and) it worked well.",
         "{S} [made|mended|bought] [light|better] shoes (and) {H} [felt|ran] like the wind."),
        ("{H} [came second|won the {o}|came third].", "even the {w} [clapped|cheered].", "the {w} shook {his} hand."),
    ),
    Problem(
        "sad",
        {"o": "sing|whistle|swim|dance|juggle|skate"},
        ("{H} wanted to {o}.", "[everyone|all {his} friends] could {o}.", "there was a [show|fair] on Sunday. {H} wanted to {o}."),
        ("{he} tried to {o} (but) [it went wrong|it did not work|{he} was stiff].",
         "the others [laughed|giggled] (because) {H} could not {o}.",
         "{H} [tried|practised] once (and) {he} [fell over|gave up|failed]."),
        ("{S} [began|started] with [one|a] small [step|part] (then) {T} [did|repeated] it [every day|ten times].",
         "{S} [showed|explained|copied] how [others|experts|masters] {o} (then) {T} [tried|did] the same.",
         "{S} [went|walked] to [a quiet place|the pond] (and) there {T} [practised|trained] [all week|in peace]."),
        ("now {H} could {o}.", "on Sunday, the crowd cheered.", "\"look, I can {o}!\" [cried|called] {H}."),
    ),
    Problem(
        "lonely",
        {"o": "cake|drum|kite|book|lamp"},
        ("it was {his} birthday.", "{H} [got up early|combed {his} hair] for {his} birthday.", "{H} waited for {his} birthday guests."),
        ("nobody [said|remembered] anything (and) the house was [empty|silent].",
         "[everyone|all the others] [had gone out|was busy] (and) [no letter|no card] came.",
         "{H} [set|laid] the table for six (but) [no one|nobody] [came|rang]."),
        ("{S} [followed|heard] [whispers|giggles|music] in the barn (then) {T} [opened|pushed] the door. surprise! there was a {o} for {H}.",
         "{S} [saw|noticed|found] a [note|map|letter] (and) it [led|took] {T2} to the garden. a party! a {o} was the present.",
         "{S} heard [laughter|a song|a rumour] (then) {T} went to the [meadow|barn]. all friends were there, with a {o}."),
        ("nobody had forgotten {him}.", "the {o} was {c}.", "they [ate|sang|played] [till late|for hours]."),
    ),
    Problem(
        "sad",
        {"o": "sandwiches|pancakes|sausages|muffins|dumplings", "w": "barn|tent|cave|attic"},
        ("{H} had planned a picnic.", "{H} packed {o} for a picnic.", "{H} [spread|laid|shook] [out|down] a {c} blanket."),
        ("[dark clouds|big drops] [came|fell] (and) it [poured|rained hard] on the {o}.",
         "it [started|began] to rain (so) the picnic [was ruined|had to stop].",
         "rain [splashed|dripped] on the [blanket|{o}] (and) [everything|it all] got wet."),
        ("{S} [carried|took|moved] everything into a {w} (then) {T} [ate|picnicked] there.",
         "{S} [knew|found|opened] a dry {w} [nearby|close by] (then) {T} had the picnic inside.",
         "{S} [hung|stretched|tied] a [sail|cloth] over the branches (then) {T} sat [dry|safe] under it."),
        ("the {o} [tasted great|were still good].", "rain [drummed|sang] above them.", "it was [cosy|better] that way."),
    ),
    Problem(
        "angry",
        {"o": "frogs|crickets|cats|owls|geese"},
        ("{H} [was tired|went to bed early].", "{H} wanted to sleep.", "{H} [yawned|put on {his} pyjamas]."),
        ("the {o} [sang|shouted|made noise] outside (so) {H} [lay awake|could not sleep].",
         "[ten|twenty|a hundred] {o} [gave a concert|had a party] (and) it was [far too loud|midnight].",
         "{he} [closed|shut] the window (but) the {o} [were louder|did not stop]."),
        ("{S} [asked|begged] the {o} for [silence|a lullaby] (and) they [sang softly|understood|were sorry].",
         "{S} [stuffed|put] [wool|wax] in {his} ears (and) [all|everything] was [quiet|silent].",
         "{S} [brought|gave] the {o} some [corn|cake|milk] (because) they were [hungry|bored]. then it was quiet."),
        ("{H} slept till noon.", "the {o} [slept|snored] too.", "\"good night, {o},\" [said|mumbled] {H}."),
    ),
    Problem(
        "scared",
        {"o": "boat|raft|canoe|dinghy", "w": "wax|a cork|{his} shirt|moss|tar"},
        ("{H} [owned|had built] a {c} {o}.", "{H} [rowed|sailed|paddled] out in a {c} {o}.", "{H} went fishing in {his} {o}."),
        ("the {o} [hit|scraped] a rock (and) water [came|poured|ran] in.",
         "the {o} [got a hole|cracked|sprang a leak] (so) [it filled up|it began to sink|water came in].",
         "{his} feet got wet (because) the {o} [leaked|had a hole]."),
        ("{S} [plugged|stopped|filled] the hole with {w} (then) {T} [rowed|paddled] [home|ashore].",
         "{S} [scooped|bailed] out water with a [hat|pot|shoe] (then) {T} [reached|made it to] the shore.",
         "{S} [waved|blew a horn|shouted] to a [ship|fisherman] (and) it [pulled|towed] the {o} ashore."),
        ("{T} [painted|mended] the {o} [at home|next day].", "dry land felt good.", "{H} [checked|tarred] the {o} every spring."),
    ),
    Problem(
        "worried",
        {"o": "mother|father|teacher|grandmother", "w": "picture|necklace|poem|song|cushion"},
        ("[soon|tomorrow] it was {his} {o}'s birthday.", "{H} loved {his} {o}.", "{H} needed a gift for {his} {o}."),
        ("{H} wanted to buy a present (but) {his} [purse|piggy bank|pocket] was empty.",
         "{he} had no money (because) [{he} had bought sweets|{he} had lost it|everything was spent].",
         "[the|all] shops were closed (and) {H} had nothing for {his} {o}."),
        ("{S} [said|thought]: [make something|gifts need no money] (so) {T} [made|began] a {w}.",
         "{S} [collected|gathered|found] [shells|feathers|pretty stones] (then) {T} made a {w} [with|about] them.",
         "{S} [worked|helped] [at the bakery|for a farmer] (then) {T} got [paint|a {w}|silk] for it. it became a {w}."),
        ("{his} {o} loved the {w}.", "\"a {w}! how lovely!\" said {his} {o}.", "{his} {o} [cried|beamed] with joy."),
    ),
    Problem(
        "scared",
        {"o": "door|window|chimney"},
        ("it had snowed [for days|all week].", "{H} [looked|peeked] out. all was white.", "{H} [woke|got] up. it was [too dark|strangely quiet]."),
        ("snow [blocked|covered] the {o} (and) {H} [could not get out|was trapped|was shut in].",
         "the {o} [did not open|was stuck] (because) the snow was [so high|so heavy].",
         "{H} [pushed|banged|leaned] against the {o} (but) the snow [held it|did not move]."),
        ("{S} [dug|shovelled|made] a tunnel with a [spoon|pan|shovel] (then) {T} [came|crawled] out [in the sun|at noon].",
         "{S} [boiled|heated] water (then) {T} [melted|poured it on] the snow.",
         "{S} [slid|climbed] [down from|out of] the attic (then) {T} [cleared|freed] the {o}."),
        ("then they had a snowball fight.", "the {o} was free.", "{H} [built|made] a [tall|fat] snowman."),
    ),
    Problem(
        "worried",
        {"o": "lamb|kitten|duckling|chick|foal", "w": "barn|pond|meadow|orchard"},
        ("{H} [walked|strolled] [home|along the lane].", "{H} [sat|rested] [on a bench|in the sun].", "{H} [swept|cleaned] the yard."),
        ("a [tiny|little] {o} [followed|ran after] {him} (because) it had lost its mother.",
         "a {o} [stood|cried] at the [gate|corner] (and) its mother was [nowhere|not there].",
         "\"mama?\" [asked|peeped] a {o} (and) it [looked|stared] at {him}."),
        ("{S} [carried|took|led] the {o} to the {w} (and) its mother [was there|ran up|called].",
         "{S} [looked for|followed|found] [tracks|hoof marks|feathers] (and) [they led|{T} came] to the {w}. there was the mother!",
         "{S} [rang|shook] a bell (and) a [worried|happy] mother came [from the {w}|running]."),
        ("the {o} [jumped|cuddled|ran] to its mother.", "the mother [thanked|kissed] {him}.", "{H} [visits|sees] the {o} every day."),
    ),
    Problem(
        "worried",
        {"o": "clock|mill|music box|pump", "w": "nest|pebble|sock|acorn"},
        ("everyone needed the old {o}.", "{H} [looked after|loved] the old {o}.", "the old {o} [never|hardly ever] stopped."),
        ("the {o} [stood still|stopped|fell silent] (and) [nobody|no one] [knew why|could start it].",
         "the {o} [coughed|squeaked|groaned] (and) it stopped.",
         "[everyone|people] [came late|complained] (because) the {o} [was broken|had stopped]."),
        ("{S} [opened|unscrewed] the {o} (and) a {w} [was|sat|hid] in the wheels. {T} [took|pulled] it out.",
         "{S} [cleaned|oiled|greased] [every|each] wheel (then) {T} [removed|found] a {w}.",
         "{S} [knocked at|tapped|hit] the {o} (and) out [fell|rolled|dropped] a {w}."),
        ("the {o} [worked|ran|turned] again.", "{H} kept the {w} [as a souvenir|in a drawer].", "the mayor [gave {him} a medal|shook {his} hand]."),
    ),
    Problem(
        "angry",
        {"o": "goat|donkey|cow|goose|ram", "w": "cabbages|leeks|flowers|tulips|peas"},
        ("{H} was proud of {his} {w}.", "{his} {w} [looked|were] [lovely|perfect].", "next door lived a {o}."),
        ("a {o} [ate|chewed|trampled] the {w} (because) the [fence|gate] [was broken|stood open].",
         "the fence [broke|fell over] (and) a {o} [entered|came] and ate {w}.",
         "{H} looked outside (and) a {o} [stood in|was eating|was tasting] the {w}."),
        ("{S} [mended|repaired|closed] the [fence|gate] (then) {T} gave the {o} [some hay|its own meadow].",
         "{S} [lured|led|got] the {o} [out|away] with [carrots|apples|sugar] (then) {T} [built|put up] a [higher|new] fence.",
         "{S} [planted|grew] [clover|grass] for the {o} (and) it [left|forgot] the {w}."),
        ("the {o} [stayed|slept] on its own side.", "the {w} grew back.", "even the {o} was [happy|pleased]."),
    ),
    Problem(
        "sad",
        {"o": "bucket|doll|teddy|shoe|basket", "w": "well|pond|river|harbour"},
        ("{H} [sat|played] by the {w}.", "{H} [loved|carried] {his} {c} {o}.", "{H} [visited|walked to] the {w}."),
        ("the {o} [fell|slipped|rolled] into the {w} (because) [the rope broke|{H} stumbled|{H} let go].",
         "there was a splash (and) the {o} [sank|went under|floated off] in the {w}.",
         "{H} [leaned over|bent down|slipped] (and) the {o} [dropped|went] into the {w}."),
        ("{S} [tied|bent] a hook [on a rope|to a line] (then) {T} [fished|pulled] out the {o}.",
         "{S} [took|found|fetched] a [long net|fishing rod] (then) {T} [caught|got|lifted] the {o}.",
         "{S} [asked|called] a [frog|duck|fish] (and) it [dived|swam] down. it brought back the {o}."),
        ("the {o} dried in the sun.", "the {o} was wet, but [fine|whole].", "{H} [shook|squeezed|wiped] the {o} dry."),
    ),
    Problem(
        "sad",
        {"o": "letter|parcel|postcard", "w": "cousin|uncle|aunt|sister"},
        ("{H} [waited|hoped] for a {o}.", "{his} {w} had sent a {o}.", "the postman brought a {o}."),
        ("the {o} [got wet|fell in a puddle|lay in the rain] (and) [nobody|{H}] could read it.",
         "the {o} was [too hard to read|full of blots] (because) {his} {w} [wrote badly|had spilled ink].",
         "{H} could not read the {o} (because) {he} [had lost {his} glasses|never learned it]."),
        ("{S} [dried|held|warmed] the {o} [over|near] the stove (then) {T} [read|saw] the words.",
         "{S} [took|found|held] a [mirror|big lens] (and) [slowly|word by word] {T} [read|understood] it.",
         "{S} [read|spelled] [one word|each letter] [aloud|at a time] (then) {T} [wrote it down|understood]."),
        ("{his} {w} was coming to visit!", "it said: I miss you.", "{H} [wrote|sent] an answer to {his} {w}."),
    ),
    Problem(
        "angry",
        {"o": "blueberries|honey|jam|mud|paint", "w": "shirt|dress|coat|apron"},
        ("{H} wore a [clean|new] {w}.", "{his} [white|best|new] {w} was ready.", "there was a wedding. {H} [dressed|put on a {w}]."),
        ("{H} [slipped|stumbled] (and) {o} [landed|splashed] on the {w}.",
         "a [bee|dog|ball] [bumped|hit] {him} (and) now there was {o} on the {w}.",
         "{o} [covered|stained|soiled] the {w} (because) {H} had [played|eaten] [wildly|in it]."),
        ("{S} [soaked|scrubbed|washed] the {w} with [soap|lemon|salt] (and) the stain [vanished|came off].",
         "{S} [painted|sewed|stitched] a [flower|star|sun] over the stain (and) it looked [great|pretty].",
         "{S} [dyed|dipped] the whole {w} [blue|red|green] (and) the stain [was gone|could not be seen]."),
        ("the {w} was nicer than before.", "people [praised|admired] the {w}.", "{H} [turned|bowed] proudly in {his} {w}."),
    ),
)

# ------------------------------------------------------------------------------------------------ how sentences are joined

CONJUNCTIONS = {
    "and": ", and | and |, and then |, and soon |, and now | and before long |, and a bit later ".split("|"),
    "then": ", and | and | and then |, and soon | and quickly |, and at once |, and after a while | and calmly |, and a little later | and carefully ".split("|"),
    "so": ", so | and so |, and so |, and therefore ".split("|"),
    "but": ", but | but |, yet |, but sadly |, and yet ".split("|"),
    "because": " because |, because |, for |, since | as ".split("|"),
    "until": [" until "],
}
SPEECH_VERBS = "said asked cried called whispered shouted wailed sobbed yelled sighed mumbled laughed peeped".split()

# ------------------------------------------------------------------------------------------------ words that do not make a sentence different

CATEGORIES = {
    "NAME": GIRLS + BOYS,
    "PRON": "he she him her his himself herself they them".split(),
    "KIND": [*ANIMALS, "girl", "boy"],
    "KIN": [*RELATIONS["she"], *RELATIONS["he"], *"mother father teacher grandma grandpa".split()],
    "ADJ": TRAITS + COLOURS + "sunny windy cloudy misty chilly bright warm cold old new big long tiny hungry thin poor hot".split(),
    "FEELING": "sad unhappy happy glad pleased scared afraid angry cross worried lonely proud content miserable awful".split(),
    "TIME": "day morning evening night afternoon noon summer winter spring autumn week month sunday monday friday".split(),
    "NUMBER": "two three four five six seven ten twelve twenty".split(),
    "PLACE": "|".join(HOMES).replace("|", " ").split(),
    "THING": " ".join(options for problem in PROBLEMS for options in problem.things.values()).replace("|", " ").split(),
}
FUNCTION_WORDS = frozenset("a an the in on at of to by into under near behind above out {his}".split())
