"""The embedded demo: invented visits, their dialogues and notes, and the recipe of a tiny base."""
