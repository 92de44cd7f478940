"""The demo model of Baton: its corpus, its training, its prompts and the trained weights."""
