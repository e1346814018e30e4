"""The naive, readable definition of correct for every op. Imports nothing from the rest of the package."""
