"""The embedded world: invented visits, their dialogues and notes, a pre-training corpus and the untrained tiny base."""
