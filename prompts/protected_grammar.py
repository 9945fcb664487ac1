"""The grammar of protected.txt: word tables and templates. write_protected.py expands it.

In a template or a word, {name} is a word of that table and {name*} its plural; {class} stays as it is. "a" becomes
"an" where it must. Words that go together share a table: what is worn, what is made of glass, what swims.
"""

# Each table as `name: word, word, …`; an indented line continues the one above.
WORDS = """
hue: red, orange, yellow, green, blue, purple, pink, white, black, brown, grey
colour: {hue}, {shade}
shade: beige, turquoise, navy blue, dark green, light blue, crimson, olive green, cream, burgundy, lavender, mint green, golden,
  silver, pale yellow, bright red, mustard yellow, teal, charcoal grey, sky blue, dark brown, hot pink, deep purple, lime green, maroon, off-white, neon green, pastel pink
pattern: striped, checked, polka-dot, floral, tartan, spotted, camouflage, patchwork, embroidered, paisley, two-tone
marks: white stripes, black spots, gold stars, a floral pattern, a checked pattern, small dots, a zigzag pattern, painted flowers,
  a torn edge, blue patches
size: tiny, small, large, huge, giant, miniature, oversized, little, big, enormous
state: old, new, clean, dirty, wet, dusty, muddy, vintage, antique, modern, ordinary, simple, beautiful, elegant, ugly, worn,
  handmade, colourful, strange, forgotten, expensive, lovely, plain-looking, fancy, cute
finish: shiny, glossy, matte, transparent, translucent, metallic, smooth, rough, polished, fuzzy, soft, crumpled, varnished,
  glittering, reflective, sequinned

gloss: shiny, glossy, metallic, glittering, silver, golden, transparent, sequinned, reflective, patent leather, satin, neon
stuff: plastic, wooden, leather, denim, wool, cotton, silk, velvet, linen, rubber, paper, glass, ceramic, metal, steel, brass,
  copper, stone, clay, felt, knitted, crocheted, waxed cotton, nylon, vinyl, satin, lace, fur, quilted, cardboard, canvas, tin,
  straw, corduroy, fleece, tweed
substance: wood, glass, paper, metal, stone, wool, leather, rubber, ice, leaves, flowers, sand, clay, gold, cardboard, bricks,
  straw, chocolate, clouds, plastic, felt, denim
outer: coat, overcoat, jacket, blazer, cape, cloak, waistcoat, hooded coat
outer_cloth: wool, leather, denim, corduroy, tweed, velvet, quilted, suede, canvas, linen, cotton, fur-lined
light_top: shirt, blouse, dress, skirt, scarf, robe, evening dress, summer dress, nightgown, shawl, headscarf, kimono
light_cloth: cotton, silk, linen, satin, velvet, lace, chiffon, flannel, knitted, wool
garment: {outer}, {light_top}, trench coat, cardigan, sweater, hoodie, t-shirt, hat, cap, beanie, straw hat, suit, tie, bow tie,
  apron, poncho, uniform, tracksuit, bathrobe, wedding dress, parka, windbreaker, anorak, rain hat, puffer vest, rain jacket,
  tuxedo, sari, tunic, polo shirt, life jacket, lab coat
pair: boots, sneakers, sandals, slippers, jeans, shorts, trousers, gloves, mittens, socks, sunglasses, pyjamas, overalls, rubber
  boots, leggings, high heels
person: person, man, woman, boy, girl, child, old man, old woman, young man, young woman, teenager, grandmother, grandfather,
  tourist, stranger
job: firefighter, nurse, doctor, teacher, chef, baker, farmer, fisherman, sailor, pilot, astronaut, police officer, postman,
  carpenter, blacksmith, mechanic, painter, musician, dancer, ballerina, scientist, librarian, waiter, gardener, tailor, builder,
  knight, king, queen, monk, wizard, pirate, samurai, cowboy, clown, soldier, judge, student, hiker, cyclist, surfer, skier,
  footballer, boxer, photographer, shepherd, miner, barber, beekeeper, street musician, plumber
mood: happy, sad, tired, smiling, angry, elegant, lonely, proud, curious, calm, surprised, worried, laughing, shy
hair: long black hair, curly red hair, short blonde hair, glasses, freckles, braided hair, a ponytail, brown eyes, short hair,
  dark skin, a friendly smile, wavy brown hair
doing: reading a book, drinking coffee, laughing, smiling at the camera, singing, looking at a map, playing the violin, talking on
  the phone, eating an apple, holding a balloon, drawing, taking a photo, waiting, playing the guitar, waving, looking at a phone,
  carrying a basket, holding flowers, eating ice cream, thinking
outdoors: riding a bicycle, walking a dog, feeding pigeons, planting a tree, flying a kite, running, pushing a pram, riding a
  horse, picking apples, holding an umbrella, building a snowman, carrying firewood, selling vegetables, throwing a ball, skating,
  watching the sky, digging a hole, having a picnic
chore: cooking soup, washing dishes, playing the piano, writing a letter, painting a picture, sweeping the floor, sleeping,
  ironing a shirt, playing chess, working at a desk, looking out of a window, baking bread, repairing a clock, sewing, lighting a
  candle, blowing out candles
plain_pet: cat, dog, kitten, puppy, rabbit, hamster, guinea pig
breed: tabby cat, siamese cat, persian cat, ginger cat, golden retriever, dachshund, poodle, border collie, terrier, husky,
  bulldog, greyhound, spaniel, sheepdog
pet: {plain_pet}, {breed}
beast: horse, cow, sheep, goat, pig, donkey, llama, fox, wolf, bear, deer, moose, squirrel, hedgehog, raccoon, badger, lion,
  tiger, leopard, elephant, giraffe, zebra, rhinoceros, camel, kangaroo, koala, panda, monkey, gorilla, bison, wild boar, hare,
  foal, lamb, tortoise, mouse, lynx, otter, beaver, antelope
songbird: crow, robin, sparrow, swallow, pigeon, magpie, finch, starling
percher: {songbird}, eagle, owl, parrot, woodpecker, kingfisher, jay
water_bird: swan, duck, goose, heron, flamingo, pelican, penguin, seagull, stork
bird: {percher}, {water_bird}, rooster, hen, peacock
sea: dolphin, whale, shark, octopus, jellyfish, crab, sea turtle, seahorse, goldfish, starfish, manta ray, seal, clownfish, squid,
  salmon
insect: butterfly, bee, dragonfly, ladybird, spider, snail, beetle, grasshopper, caterpillar, moth, ant, frog, lizard, gecko
animal: {pet}, {beast}, {bird}, {sea}, {insect}
fur: black, white, brown, grey, spotted, small, fluffy, sleepy, old, young, wet, playful, golden, skinny
animal_doing: running, sleeping, standing, looking at the camera, walking, drinking water, resting, eating, playing, yawning
wild_place: in a forest, in tall grass, on a hill, in the snow, by a river, in a meadow, at a waterhole, at night, in the morning
  mist, behind a fence, in a zoo
pet_place: on a bed, on a windowsill, in a kitchen, under a table, on a rug, in a garden, in a basket, by the fireplace, on a
  doorstep, in a bathtub, on an armchair, in a park
flower: rose, tulip, sunflower, daisy, orchid, lily, poppy, peony, carnation, dandelion, iris, hydrangea, daffodil, snowdrop,
  water lily, magnolia
pot_plant: {flower}, cactus, fern, bonsai tree, aloe plant, rose bush, palm tree, herb
tree: oak tree, pine tree, palm tree, birch tree, apple tree, maple tree, willow tree, olive tree, fir tree, cherry tree, cypress,
  beech tree
plant: {flower}, {tree}, cactus, fern, ivy, mushroom, bonsai tree, bamboo, moss, clover, thistle, reed, wheat, aloe plant,
  climbing rose, hedge
fruit: apple, banana, orange, pear, peach, lemon, lime, strawberry, cherry, pineapple, watermelon, mango, plum, pumpkin, tomato,
  carrot, potato, onion, cucumber, aubergine, bell pepper, cabbage, coconut, fig, avocado, radish, artichoke, walnut
snack: apple, banana, peach, pear, plum, cookie, sandwich, slice of pizza, hamburger, taco, croissant, bowl of soup, ice cream
  cone
dish: bowl of soup, slice of pizza, plate of spaghetti, cup of coffee, hamburger, sandwich, loaf of bread, croissant, birthday
  cake, apple pie, stack of pancakes, bowl of noodles, plate of sushi, roast chicken, green salad, glass of lemonade, mug of hot
  chocolate, pot of tea, cheese board, omelette, taco, ice cream cone, doughnut, cupcake, cookie, jar of honey, bottle of milk,
  basket of eggs, bunch of grapes, bowl of rice, bowl of curry, pretzel, fried egg, grilled fish, waffle, box of chocolates, glass
  of red wine
laid: on a plate, on a table, on a wooden board, on a white plate, in a kitchen, on a tray, on a market stall, by a window, on a
  checked tablecloth, on a marble counter
car: car, sports car, taxi, bus, double-decker bus, truck, fire engine, van, motorcycle, bicycle, scooter, tractor, ambulance,
  police car, camper van, pickup truck, convertible, horse-drawn carriage, delivery van, racing car
road: on a country road, in a busy street, in front of a garage, in the desert, on a bridge, in a snowy village, at a crossroads,
  on a mountain road, in a car park, beside a field
boat: sailboat, rowing boat, ferry, cargo ship, canoe, fishing boat, yacht, kayak, gondola, raft, pirate ship, tugboat
water: on a calm lake, in a harbour, on a stormy sea, on a river, near an island, at a jetty, in the fog, at sunset, under a
  bridge
flyer: airplane, helicopter, hot air balloon, glider, biplane, airship, rocket, drone
sky: above the clouds, over a city, against a blue sky, over the mountains, in the evening sky, over the sea, over a desert
train: train, steam locomotive, tram, subway train, freight train, cable car
vehicle: {car}, {boat}, {flyer}, {train}
house: house, cottage, cabin, castle, church, temple, lighthouse, windmill, barn, farmhouse, tower, palace, chapel, water mill,
  monastery, villa, hut, inn, ruined abbey, manor house
setting: on a hill, by the sea, at the edge of a forest, beside a river, in a village, in the mountains, in the fog, in a valley,
  among trees, on a cliff, in a field
hall: skyscraper, library, museum, school, hospital, hotel, theatre, train station, bakery, bookshop, cafe, restaurant, factory,
  town hall, market hall, apartment block, post office, cathedral, opera house, office building, shopping arcade
building: {house}, {hall}, bridge, pagoda, stadium, greenhouse, igloo, tent, treehouse, garden shed, gate, fountain
age: old, new, dirty, clean, muddy, dusty, vintage, rusty, shiny, broken-down
old: old, modern, abandoned, small, grand, crumbling, brightly painted, half-timbered, stone, brick
furniture: chair, couch, sofa, armchair, table, desk, bed, bookshelf, wardrobe, chest of drawers, stool, bench, floor lamp,
  mirror, rug, rocking chair, cupboard, cradle, coffee table
wood_thing: chair, table, stool, bench, desk, bed, bookshelf, rocking chair, garden bench, kitchen table, bedside table
hard: wooden, metal, plastic, oak, wicker, steel, bamboo, pine
soft: leather, velvet, linen, striped, floral, tufted
room: in a kitchen, in a living room, in a bedroom, in an attic, in a studio, in an empty room, in a hallway, in an office, by a
  window, in front of a white wall
vessel: teapot, cup, mug, plate, bowl, vase, jug, tray, candlestick, jar, spoon, box, goblet, sugar bowl
vessel_stuff: wooden, copper, brass, glass, ceramic, silver, porcelain, enamel, pewter, clay, tin, crystal
object: {vessel}, bottle, fork, knife, kettle, frying pan, candle, clock, book, newspaper, pencil, pair of scissors, umbrella,
  suitcase, backpack, handbag, wallet, key, ladder, hammer, saw, bucket, broom, basket, lantern, light bulb, telephone, radio,
  television, laptop, keyboard, camera, globe, map, typewriter, sewing machine, violin, guitar, piano, drum, trumpet, flute,
  accordion, toy train, teddy bear, doll, kite, football, tennis racket, skateboard, chessboard, balloon, gift box, wristwatch,
  ring, necklace, crown, pair of glasses, comb, toothbrush, towel, pillow, blanket, shovel, watering can, flowerpot, anchor,
  compass, telescope, microscope, hourglass, envelope, paintbrush, whistle, birdcage, mailbox, robot, statue
surface: on a table, on a shelf, on a chair, on the floor, on a wooden desk, on a windowsill, on a bed, on a white background, on
  a black background, beside a window, in a box, on a carpet, on the grass, on a stone step, in a shop window, on a pedestal, on a
  grey background, in a display case, against a wall, on a blanket
outside: in a garden, on a street, on a beach, in a forest, in a park, in the desert, in the mountains, by a lake, on a bridge, in
  a field, on a rooftop, in a city square, in a narrow alley, by the sea, in a meadow, in a village, under a tree, beside a river,
  near a waterfall, in a car park, in front of a brick wall, on a wooden pier, at a bus stop, in a courtyard, on a hill
inside: in a kitchen, in a library, in a classroom, in a living room, in a museum, in a workshop, in an empty room, in a studio,
  in a subway station, on a stage, in a cafe, in a bedroom, in a shop, in an office, in a hallway, in an attic, in a waiting room,
  at a train station, in a greenhouse, in a barn
place: {outside}, {inside}
scenery: landscape, mountain lake, desert, waterfall, forest, river, beach, island, volcano, valley, canyon, cliff, meadow, swamp,
  glacier, cave, jungle, vineyard, harbour, village, street, market, park, garden, country road, city skyline, suburb, rice
  terrace, wheat field, coral reef, rocky coast, pine forest, old town, cemetery, playground, railway line, orchard
woods: forest, meadow, vineyard, garden, park, pine forest, swamp, jungle, orchard, wheat field, canyon, valley, village
skies: a rainbow, lightning, northern lights, a full moon, a starry sky, thick fog, dark clouds, birds, fireworks, a red sunset
nature: rainbow, lightning, northern lights, full moon, milky way, starry sky, sunrise, sunset, snowstorm, fog, rain, clouds,
  waves, tornado, frost, campfire, autumn leaves, icicles, puddle, dew
idea: love, freedom, chaos, music, time, dream, memory, happiness, silence, energy, winter, spring, summer, autumn, night, city,
  home, family, war, peace, childhood, future, history, journey, science, dance, loneliness, hope, fear, beauty, texture,
  abstract, pattern, food, animals, nature, fashion, architecture, interior, people
weather: in the rain, in the snow, in thick fog, on a sunny day, under a cloudy sky, in a storm, on a windy day, under a clear
  blue sky, in heavy rain, in falling snow, on a hot day
time: at night, at sunrise, at sunset, at dawn, at dusk, at noon, in the early morning, in the evening, in the moonlight, in the
  afternoon
season: in spring, in summer, in autumn, in winter
light: soft light, warm light, golden hour, hard shadows, natural light, studio lighting, candlelight, backlight, neon light,
  dramatic lighting, overcast light, cinematic lighting, rim light, low key, high key, moonlight, morning light
shot: photo, close-up photo, black and white photo, blurry photo, wide shot, studio photo, snapshot, picture, old photograph, high
  resolution photo, film still, low-angle shot, professional photo, sharp photo, dark photo, colour photo, magazine photo, instant
  photo, bad photo, drawing, rendering, painting
flat: an oil painting, a watercolour, a pencil drawing, a charcoal sketch, an ink drawing, a pastel drawing, a woodcut, a linocut,
  an engraving, a digital painting, a 3d render, pixel art, a cartoon, a comic book panel, a children's book illustration, a paper
  cutout, a stained glass window, a mosaic, an embroidery, a tapestry, a fresco, a mural, a vintage poster, a collage, a screen
  print, line art, a vector illustration, an isometric drawing, a crayon drawing, a chalk drawing, an icon, a sticker, a doodle
solid: a marble statue, a bronze statue, a clay sculpture, an origami figure, a low poly model, a wooden carving, an ice sculpture
medium: {flat}, {flat}, {flat}, {solid}
art: oil painting, watercolour, pencil sketch, ink drawing, digital art, 3d render, pixel art, illustration, photograph, concept
  art, anime, comic, engraving, vector art, poster, line art, matte painting
style: impressionism, expressionism, cubism, surrealism, art nouveau, art deco, baroque, renaissance, romanticism, minimalism, pop
  art, realism, gothic, ukiyo-e, bauhaus, fantasy art, science fiction, anime style, film noir, retro futurism, steampunk, folk
  art, naive art, pointillism, photorealistic, medieval manuscript, street art, rococo, flat design, cyberpunk, vaporwave
lens: 35mm photograph, black and white, macro, close-up, wide angle, shallow depth of field, bokeh, long exposure, film grain,
  sharp focus, high resolution, bird's-eye view, from above, from below, side view, silhouette, double exposure, sepia,
  tilt-shift, fisheye lens, telephoto lens, 50mm lens, highly detailed, centred composition, muted colours, vivid colours, 8k
seen: from above, from behind, from the side, from below, from far away, in the distance, in the foreground, up close, in profile,
  out of focus, at the edge of the frame, in the centre, half in shadow, reflected in a mirror, through a window, against the
  light, upside down, in silhouette
condition: covered in snow, covered in mud, under a sheet, half buried in sand, in a puddle, wrapped in paper, behind a fence,
  covered in flowers, splashed with paint, with a ribbon around it, in a crate, tied to a rope, with a label, in a shopping bag,
  on a trolley, floating in water
printed: t-shirt, mug, poster, postage stamp, wall, street sign, book cover, plate, tin box, postcard, pillow, playing card
number: two, three, four, five, six, many, several, a dozen
textures: brick wall, tree bark, wood grain, water drops on glass, rusty metal, cracked earth, green moss, marble, knitted wool,
  pebbles, sand dunes, peeling paint, woven basket, blue velvet, old paper
young: young, wild, sleeping, lonely, hungry, old, large, wet
style_name: {plain_style}, a children's book, a comic book, an old map, a woodcut, a silent film
plain_style: art nouveau, art deco, pop art, cubism, the renaissance, impressionism, folk art
object_plain: candle, book, key, bottle, balloon, suitcase, umbrella, lantern, clock, cup, teapot, pencil, bucket, vase, drum,
  kite, hat, shell, coin
shape: circles, squares, triangles, stripes, dots, waves, spirals, hexagons, lines, stars
shape_one: circle, square, triangle, cube, sphere, spiral, pyramid, star, heart, line
side: from behind, from the side, from above, from below, from far away, up close
stand: on a mannequin, on a hanger, on a hook, in a wardrobe, on a clothes line, in a shop
hand: book, lantern, map, letter, cup, candle, suitcase, umbrella, violin, hammer, key, bottle, flag, bucket, basket, camera,
  sword, shell, rope, apple
extent: small, large, big, tall, wide, long
farm: horse, cow, sheep, goat, donkey, dog, cat, hen
"""

# Prompts about the class of the concept: (heading, number of lines, templates between `|`).
CLASS_SECTIONS = (
    (
        "Colours of the class",
        92,
        """
a {hue} {class} | a {shade} {class} | the {colour} {class} | {colour} {class}""",
    ),
    (
        "Patterns and pairs",
        46,
        """
a {colour} and {colour} {class} | two of them, a {hue} {class} and a {hue} {class} | one {shade} {class} and one {hue} {class}
a {size} {colour} {class} | a {colour} {class} on a {hue} background | a {pattern} {class} | a {hue} {class} with {marks}
a {pattern} {class} in {hue} and {hue}""",
    ),
    (
        "Materials",
        72,
        """
a {stuff} {class} | a {colour} {stuff} {class}""",
    ),
    (
        "Substances and finishes",
        48,
        """
a {class} made of {substance} | a {finish} {class} | a {finish} {hue} {class}""",
    ),
    (
        "Sizes and states",
        50,
        """
{class} | a {class} | the {class} | this {class} | another {class} | my {class} | a very {extent} {class}
a {class} and nothing else | a {state} {class} | {state} {class} | a {size} {class} | a {state} {colour} {class}
the {state} {class} {surface} | a {size}, {state} {class} | a {class} {condition} | a {colour} {class} {condition}""",
    ),
    (
        "Places and weather",
        74,
        """
a {class} {surface} | a {class} {outside} | a {class} {inside} | a {colour} {class} {place} | a {class} {place} {time}
a {class} {weather} | the {class} {outside} {weather} | a {stuff} {class} {surface} | a {state} {class} {place}
a {class} {season} | a {class} forgotten on a bench | a {hue} {class} {surface} | a {colour} {class} {outside}, {light}
a {class} in a tree""",
    ),
    (
        "People with it",
        76,
        """
a {person} wearing a {class} | a {person} wearing a {colour} {class} {outside} | a {job} in a {class}
a {person} in a {hue} {class} {weather} | a {person} wearing a {stuff} {class} | a {mood} {person} in a {class} {place}
a {person} with {hair} wearing a {colour} {class} | a {person} holding a {class} | a {person} with a {class} {place}
a {job} with a {class} | a {person} looking at a {class} | a {job} carrying a {hue} {class} {weather}
a {person} drawing a {class} | a {person} standing beside a {class} | the {job}'s {class} | a {person} buying a {class} in a shop
a {class} that belongs to a {job} | a portrait of a {person} with a {class} | a {person} {doing}, a {class} nearby
a {colour} {class} {stand} | a {person} wearing a {garment} and a {class} | a {stuff} {class} {stand}
a {person} wearing a {hue} {class}, seen {side}""",
    ),
    (
        "What is beside it",
        50,
        """
a {class} and a {animal} | a {class} beside a {furniture} | a {class} next to a {object} | a {pet} beside a {class}
a {hue} {class} and a {vehicle} | a {class} in front of a {building} | a {hue} {class} and a {hue} {object}
a {colour} {class} beside another {class} | a {class} among {number} {fruit*} | a {class}, a {garment} and a {object}
a {class} under a {tree} | a {colour} {class} on a {furniture}""",
    ),
    (
        "Images of it",
        60,
        """
a {shot} of a {class} | a {shot} of a {colour} {class} | a {shot} of a {state} {class} {place} | {medium} of a {class}
{flat} of a {colour} {class} {place} | a {class}, {style} | a {class} {seen} | a {colour} {class} {seen}
a {class}, {lens}, {light} | the back of a {class} | a detail of a {class} | a toy {class} | a {class} printed on a {printed}
{class}, {style}, {lens} | {colour} {class}, {lens}, {light} | {art}, {class}, {colour} and {colour}
a {shot} of a {class} {time}""",
    ),
    (
        "Long prompts",
        30,
        """
a {shot} of a {mood} {person} with a {colour} {class} {outside} {weather}, {lens}, {light}, {style}
a {hue} {class} {outside} {weather}, {light}, {lens} | a {state} {colour} {class} {surface}, {flat}, {style}, {light}, {lens}
a {shot} of a {person} with {hair} wearing a {colour} {stuff} {class} {outside}
{flat} of a {job} with a {stuff} {class} {place} {time}, {light}, highly detailed
a {shot} of a {colour} {class} {surface}, {lens}, {light}
a {person} wearing a {hue} {class} and {hue} {pair} {outside} {weather}, a {building} in the background, {light}, {lens}""",
    ),
)

SECTIONS = (
    (
        "Words",
        180,
        """
{animal} | {plant} | {object} | {building} | {vehicle} | {garment} | {fruit} | {furniture} | {job} | {scenery} | {idea} | {nature}
{pair} | {style} | {person} | {textures} | {hue}""",
    ),
    (
        "Things",
        130,
        """
a {object} | a {hue} {object} | a {vessel_stuff} {vessel} | a {colour} {object} {surface} | a {object} {surface}
a {hard} {wood_thing} | a {hue} {soft} armchair {room} | a {furniture} {room} | a {state} {object} | a {object} and a {object}
a {shot} of a {object} | a {vessel_stuff} {vessel} {surface} | the {object} {surface} | a {hue} {furniture}
an empty {wood_thing} {room} | a {finish} {hue} {object}""",
    ),
    (
        "Food",
        80,
        """
a {dish} | a {dish} {laid} | a {hue} bowl of {fruit*} | {fruit*} {laid} | a {shot} of a {dish} | a {fruit} {laid}
a {dish} and a {dish} | a {person} eating a {snack} | {flat} of a {dish}""",
    ),
    (
        "People",
        170,
        """
a {person} | a {job} | a {mood} {person} | a {person} {doing} | a {person} {doing} {place} | a {person} {outdoors} {outside}
a {job} {doing} | a {person} {chore} | a {person} {chore} {time} | a {mood} {job} {place} | a {person} with {hair}
a portrait of a {person} with {hair} | a portrait of a {job} | a {shot} of a {mood} {person} | the face of a {person}
a {person} and a {pet} {outside} | a {job} {place} {time} | {number} {job*} {place} | a group of {person*} {outside}
a crowd {outside} | {medium} of a {job} | a {person} {weather} | the hands of a {job} | a {person} {side}""",
    ),
    (
        "Clothes",
        120,
        """
a {garment} | a {hue} {garment} | a {outer_cloth} {outer} | a {colour} {outer_cloth} {outer} | a {light_cloth} {light_top}
a {colour} {light_cloth} {light_top} | {hue} {pair} | a pair of {pair} | a {person} wearing a {garment}
a {person} in a {hue} {garment} {outside} | a {job} wearing a {colour} {light_cloth} scarf | a {person} in {hue} {pair}
a {garment} {stand} | a {hue} {garment} {stand} | a {pattern} {light_top} | a {person} wearing a {outer_cloth} {outer} {weather}
a {shot} of a {garment} | a {gloss} {garment} | a {garment} and {hue} {pair}""",
    ),
    (
        "Animals",
        130,
        """
a {animal} | a {fur} {plain_pet} | a {pet} {pet_place} | a {fur} {plain_pet} {animal_doing} | a {beast} {wild_place}
a {beast} {animal_doing} | a {young} {beast} | a {percher} on a branch | a {water_bird} by the water | a {sea} under water
a {insect} on a leaf | a {insect} on a {flower} | {number} {beast*} {wild_place} | {number} {songbird*} on a wire
a {shot} of a {animal} | {medium} of a {animal} | a {pet} and a {beast} | a {pet} wearing a {garment}""",
    ),
    (
        "Plants and landscapes",
        110,
        """
a {tree} {season} | a {hue} {flower} | a vase of {flower*} | a field of {flower*} | a {tree} in a field | a {scenery}
a {scenery} {time} | a {scenery} {season} | a {scenery} {weather} | {skies} over a {scenery} | a {shot} of a {scenery}
{flat} of a {scenery} | a path through a {woods} | a {pot_plant} in a pot | the {scenery} from above | a {tree} and a {house}""",
    ),
    (
        "Vehicles and buildings",
        110,
        """
a {hue} {car} | a {car} {road} | a {age} {car} {road} {time} | a {boat} {water} | a {hue} {boat} {water} | a {flyer} {sky}
a {train} {time} | a {train} {weather} | a {old} {house} | a {house} {setting} | a {house} {setting} {season} | a {hall} {time}
a {old} {hall} {weather} | the inside of a {hall} | a {shot} of a {building} | {flat} of a {house} {setting}
a {hue} {car} in front of a {hall} | a {house} and a {tree}""",
    ),
    (
        "Styles, media, shapes and counts",
        90,
        """
{medium} | {art}, {style} | {style}, {light} | {lens} | {light} | {flat} of a {animal} and a {object}
a {object} in the style of {style_name} | {number} {object_plain*} {surface} | {number} {fruit*} | {number} {person*}
{textures} texture | an abstract painting in {hue} and {hue} | {hue} and {hue} {shape} | a {shape_one}
a pattern of {hue} {shape} | a {size} {object} | {idea}, {style}""",
    ),
    (
        "Tags",
        110,
        """
portrait, {art}, {light} | full body, {person}, {hair}, {art}, {light} | {scenery}, {time}, {style}, {lens}
{animal}, {lens}, {light} | {job}, {style}, {art}, {hue} and {hue} | {building}, {weather}, {lens}
still life, {fruit*}, {vessel}, {light}, {art} | {vehicle}, {style}, {lens}
{hue} {garment}, fashion photography, {light}, {lens} | interior, {furniture}, {light}, {hue} walls
{plant}, {art}, {style}, {hue} | {object}, product photography, {hue} background, {light}
masterpiece, best quality, {person}, {hair}, {place}, {light}""",
    ),
    (
        "Sentences",
        100,
        """
a {person} and a {person} {doing} {outside} {weather} | a {mood} {job} standing {place} with a {hand} in one hand
a {hue} {car} parked in front of a {old} {house} {time} | a {house} {setting}, seen from the window of a train {season}
a {vessel_stuff} {vessel} and a {dish} on a {hue} tablecloth, {light}, {lens}
{number} {person*} in {hue} {pair} {outside}, {lens} | a {shot} of a {pet} sleeping next to a {hue} {object} {pet_place}
a {person} with {hair} wearing a {colour} {light_cloth} {light_top} {outside}
a {scenery} {time} with a {tree} in the foreground and {skies} above it
{flat} of a {job} {doing} in front of a {building}, {style}""",
    ),
    (
        "Long prompts",
        60,
        """
a {shot} of a {mood} {person} with {hair} {doing} {place}, {light}, {lens}, {style}
{flat} of a {old} {house} {setting} {time}, with a {farm} in front of it, {style}, {light}
a {person} in a {hue} {garment} and a {job} in a {hue} {garment} {doing} {outside} {weather}
a {hue} {object}, a {dish} and a {flower} on a table beside a window, {flat}, {light}, {style}
a {scenery} {time} {season}, with a {hue} {car} and a {house} far away, {lens}, {light}, highly detailed
a {pet} looking at a {hue} {object} {surface}, {flat}, {style}, {light}, {hue} background""",
    ),
)

NEGATIVE = """
ugly | blurry | low quality | worst quality | bad anatomy | watermark | text | deformed | disfigured | cropped | jpeg artifacts
signature | extra fingers | bad hands | missing arms | out of frame | duplicate | lowres | grainy | oversaturated | mutated hands
extra limbs | poorly drawn face | logo | username | bad proportions | low resolution | overexposed | underexposed | bad quality
ugly, blurry, low quality | low quality, worst quality | blurry, low quality, watermark, text
lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped
worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry
ugly, deformed, disfigured, poor details, bad anatomy
deformed, distorted, disfigured, poorly drawn, bad anatomy, wrong anatomy, extra limb, missing limb, floating limbs, mutated
cartoon, 3d, painting, drawing, illustration, sketch | text, watermark, logo, signature
out of frame, cropped, cut off, duplicate, two heads | monochrome, greyscale, sepia
overexposed, underexposed, noise, grain, blur
bad composition, cluttered background, distorted face, long neck, cross-eyed, extra fingers"""
