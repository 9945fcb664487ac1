"""How the embedded miniature was made: rendered, trained from nothing and measured.

`python -m demo.build --help` says what can be run. A stage reads what the earlier ones left in the
work folder and in demo/:

    render     images of random scenes (which data.py draws, describes and reads back)
    vae        the autoencoder
    clip       the scorer
    unet       UNet and text encoder
    measure    figures on held-out scenes by the scorer; pages.py writes them down

config.py has every value, loop.py the training loop of all three models, tokenizers.py their
vocabularies, images.py what is done to images, journal.py how the stages ran.
"""
