"""The op ``mmc_fast::ebr_step``: contract, reference and backends."""
