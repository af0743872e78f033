"""The neural networks: the mask predictor, the visual tokenizer, its quantizer and its discriminator."""
