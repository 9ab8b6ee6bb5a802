"""What the command line shows: plans, progress and results, drawn with rich.

Decides nothing and imports no torch. One file for each thing that is shown; what a terminal can show is
for ``look.py``.
"""

from memfit.report.terminal.blocks import BlockStrip as BlockStrip
from memfit.report.terminal.peak import PeakBar as PeakBar
from memfit.report.terminal.pictures import plan_pictures as plan_pictures
from memfit.report.terminal.pictures import run_pictures as run_pictures
from memfit.report.terminal.pictures import spaced as spaced
from memfit.report.terminal.sparks import LiveBytes as LiveBytes
from memfit.report.terminal.sparks import sparkline as sparkline
from memfit.report.terminal.tables import columns as columns
from memfit.report.terminal.tables import facts as facts
from memfit.report.terminal.tables import frontier_table as frontier_table
from memfit.report.terminal.tables import plan_table as plan_table
from memfit.report.terminal.tables import recomputed_share as recomputed_share
from memfit.report.terminal.tables import result_table as result_table
from memfit.report.terminal.tables import strategy_notes as strategy_notes
from memfit.report.terminal.tables import strategy_table as strategy_table
from memfit.report.terminal.tables import tried_table as tried_table
from memfit.report.terminal.verdicts import frontier_verdict as frontier_verdict
from memfit.report.terminal.verdicts import plan_verdict as plan_verdict
from memfit.report.terminal.verdicts import result_verdict as result_verdict
from memfit.report.terminal.watcher import TerminalWatcher as TerminalWatcher
