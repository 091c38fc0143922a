"""gRPC and HTTP over any scorer."""
