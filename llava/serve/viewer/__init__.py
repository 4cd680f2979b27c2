"""What a method did with a picture, as data and as HTML: what the page and the gallery show, without either of them.

Setting -> Desk.look -> Look -> Comparison -> html.document, html.fragment, json
"""
