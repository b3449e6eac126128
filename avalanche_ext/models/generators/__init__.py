"""Networks that learn to make samples: one protocol, variational autoencoders, adversarial ones."""
