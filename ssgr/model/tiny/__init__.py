"""The reasoning model that ships with the project: its recipe, its tokenizer and its weights."""
