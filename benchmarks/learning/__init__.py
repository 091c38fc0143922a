"""Learning experiments: do the orderings that papers report appear on models trained here?"""
