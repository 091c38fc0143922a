"""The objective: settings and presets, compiled to a plan, computed by one chunked loss.

`settings`, `presets` and `compile` import no torch; `loss` and everything it uses does.
"""
