"""Training of the image tokenizer through the same loop as the transformer.

    config.py         TokenizerRun: what a YAML file with a section `vqgan` says
    task.py           the tokenizer as the loop sees it
    feed.py           batches of pictures, resumable
    augment.py        pictures mirrored, moved and scaled on the device
    perceptual.py     VGG16 features and the distance between them
    discriminator.py  PatchGAN
    losses.py         hinge losses and the adaptive weight
    step.py           one step of both networks, the codebook and the moving average
    quality.py        PSNR and SSIM
    evaluate.py       held-out pictures through the averaged weights
"""
