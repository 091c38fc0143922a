"""The rollout process: prompts in, sampled responses out."""
