"""Registered operators: schemas, fake implementations, autograd and the choice of backend."""
