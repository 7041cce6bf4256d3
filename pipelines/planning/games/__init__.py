"""Games as worlds that an agent plans in. Imports `pipelines.fetchers.games`."""
