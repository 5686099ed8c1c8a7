"""Images: pack a warm state as a layer, add it to an image, label it and publish it."""
