"""How the demo corpus in recipes/demo_corpus is made: one module per idea, called by tools/build_demo_corpus.py."""
