"""What every HTTP application has around its routes: keys, limits, typed errors, readiness. Imports telemetry."""
