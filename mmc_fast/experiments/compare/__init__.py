"""The comparison of methods: a resumable grid of trainings, the search of their settings, tables with tests."""
