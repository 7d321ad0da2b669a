"""Reports: results shown to people, as tables in the terminal, as a page with charts, as a picture or as JSON.

`labels` names metrics, sizes and number formats for all of them. `summary` gathers everything a run can tell as plain
data, and reads the weights back (`weight_errors`). `terminal` prints; `html_page` writes that data as JSON or, with
`page_sections` and `charts`, as a page; `frontier_plot` draws a picture. Modules here may import `tuning`, `engine`,
`runtime`, `graph` and `core`. Charting libraries are imported only here, and rich only in `terminal` (and in
`cli`). A report never changes a model or a result.
"""
