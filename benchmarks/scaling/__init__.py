"""Scaling: a day of bursty load through the real queue, with the replicas that the deployed rules ask for."""
