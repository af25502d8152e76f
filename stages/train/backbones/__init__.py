"""Vision-language models; one file per backbone."""
