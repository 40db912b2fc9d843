"""The judge of small images: a classifier of the run's own data, and the scores by it.

Digits of 8x8, grey 28x28 and CIFAR-sized colour images are too small for Inception-V3's features to
mean much. A convolutional network trained on the training split of the very data set gives features
for the Fréchet distance and tells whether a sample shows the class it was asked for; a search for
the nearest training image tells whether samples are copies.
"""
