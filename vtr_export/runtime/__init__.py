"""Running an artifact: image and prompt in, answer out; without torch and transformers."""
