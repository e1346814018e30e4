"""The primitives that exact AGOP is made of: contract, reference and backends."""
