#!/bin/sh
# data/wikitext2.sh - WikiText-2: 720 good articles of Wikipedia, in 2 million words.
#
#     sh data/wikitext2.sh
#
# See data/wikitext.sh. Licence of the data: CC BY-SA 3.0.

name=wikitext2
about='Downloads WikiText-2 (Merity and others, 2016): 600 articles to train on, 60 and 60 held out, 13 MB.'
number=2
raw_sum=ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11
words_sum=92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c
. "$(dirname "$0")/wikitext.sh"
