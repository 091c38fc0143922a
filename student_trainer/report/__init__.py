"""A run as one page: curves, throughput and sample rollouts coloured by what the teacher thought."""
