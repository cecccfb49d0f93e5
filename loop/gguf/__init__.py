"""llama.cpp's file format: a base is read from it, a model is written to it."""
