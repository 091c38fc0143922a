"""The student trainer: rollouts in, scores in, a better student out."""
