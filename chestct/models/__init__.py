"""VGG16 with a head: weights, the plain network, its frozen features, and the LightningModule that trains it."""
