"""The main job on real models and text: what did a fine-tune change, and which changes are artefacts?"""
