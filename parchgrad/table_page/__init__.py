"""A selection table as one HTML page to look at: who owns which channels, which classes are alike, what excites them.

`figures` holds the numbers, `heat_map` and `photographs` the pictures, `history` how the table was built; `page` puts
them into `page.html.j2`.
"""

from parchgrad.table_page.page import write_page

__all__ = ["write_page"]
