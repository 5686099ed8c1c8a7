"""The Chatterbox model variants, one module each."""
