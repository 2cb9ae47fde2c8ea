#!/bin/sh
# data/wikitext103.sh - WikiText-103: 28,595 good articles of Wikipedia, in 103 million words.
#
#     sh data/wikitext103.sh
#
# See data/wikitext.sh. Licence of the data: CC BY-SA 3.0.

name=wikitext103
about='Downloads WikiText-103 (Merity and others, 2016): 28,475 articles to train on, 60 and 60 held out, 540 MB.'
number=103
raw_sum=91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794
words_sum=242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590
. "$(dirname "$0")/wikitext.sh"
