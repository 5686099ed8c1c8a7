"""The model: from text to tokens, to a mel spectrogram, to audio."""
