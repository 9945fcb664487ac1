"""How the embedded miniature was made: rendered, trained from scratch and measured.

See `python -m demo.build --help`. A stage reads the output of the earlier ones from the work folder and from demo/:

    render     images of random scenes (data.py samples, describes and loads them)
    vae        the autoencoder
    clip       the scorer
    unet       UNet and text encoder
    measure    figures on held-out scenes by the scorer; pages.py writes the page

config.py has every value, loop.py the training loop of all three models, tokenizers.py their vocabularies, images.py
the conversions of images, journal.py the record of each stage.
"""
