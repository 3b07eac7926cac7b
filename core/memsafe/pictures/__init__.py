"""Pictures of a run: what happened over time (timeline.py), as one HTML page (page.py, charts.py) or with matplotlib (figure.py)."""
