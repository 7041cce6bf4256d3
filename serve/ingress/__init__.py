"""What all HTTP applications share: API key, limits, errors, readiness. Imports telemetry."""
