"""An evaluation as one HTML page to look at: who is first and how surely, what it costs, where each method errs.

`verdict` says the findings in sentences, `charts` lays out the drawings, `pictures` draws the cases; `page` puts
them into `page.html.j2`.
"""

from parchgrad.evaluation_page.page import write_page

__all__ = ["write_page"]
