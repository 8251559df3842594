"""The web page at `/`: the routes that hand it out, and in static/ the page itself (docs/page.md)."""
