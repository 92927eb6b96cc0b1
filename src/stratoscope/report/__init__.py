"""One self-contained HTML file per run: `explain` computes, `page` draws."""
